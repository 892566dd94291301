// out = mix + x, where the mix is grouped and of three depthwise convolutions of x with kernels of
// 7, 5 and 3 pixels a side and zeros around. The c-th channel of group j, out of n = channels /
// groups: out = mix_bias + x + sum over branches b and the group's channels i of M[j n + c][b n +
// i] D_b[i].
#pragma once

#include "kernelpose/maps.h"

namespace kernelpose {

constexpr int kBranches = 3;
constexpr int kLargestKernel = 7;  // side of branch 0; each further one is 2 smaller
constexpr int kLargestMargin = kLargestKernel / 2;

KP_HOST_DEVICE constexpr int branch_side(int branch) { return kLargestKernel - 2 * branch; }
// Where a branch's taps begin among those of all: 49 + 25 + 9.
KP_HOST_DEVICE constexpr int branch_taps(int branch) {
  return branch == 0 ? 0
                     : branch_taps(branch - 1) + branch_side(branch - 1) * branch_side(branch - 1);
}
constexpr int kTaps = branch_taps(kBranches);

struct MultiGranularityShape {
  Maps maps;
  int64_t width, groups;

  KP_HOST_DEVICE int64_t height() const { return maps.pixels / width; }
  KP_HOST_DEVICE int64_t group_channels() const { return maps.channels / groups; }
};

}  // namespace kernelpose
