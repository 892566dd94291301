// relu(deconvolution of x + bias), the deconvolution of kernel 4, stride 2 and padding 1: x (batch,
// height, width, inputs) and out (batch, 2 height, 2 width, outputs), where the channels of a pixel
// are neighbours. The norm between the two is folded in.
#pragma once

#include <cstdint>

namespace kernelpose {

struct DeconvolutionShape {
  int64_t batch, height, width, inputs, outputs;
};

}  // namespace kernelpose
