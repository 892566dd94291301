// y = x + depthwise(x), out = y + project(relu(expand(y))): x and out (batch, height, width,
// channels), where the channels of a pixel are neighbours. The depthwise convolution is 3x3, padded
// with zeros; expand has `hidden` outputs; each adds a bias, into which its norm is folded.
#pragma once

#include <cstdint>

namespace kernelpose {

struct DepthwiseFFNShape {
  int64_t batch, height, width, channels, hidden;
};

}  // namespace kernelpose
