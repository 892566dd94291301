// out = [x +] project(act2(depthwise(act1(expand(x))))): two 1x1 convolutions around a wider map
// and in between, if at all, a depthwise 3x3 one with zeros around. x (batch, height, width,
// inputs) and out (batch, out_height, out_width, outputs), where the channels of a pixel are
// neighbours.
#pragma once

#include <cstdint>

namespace kernelpose {

constexpr int kBottleneckTaps = 9;

enum class Activation { kNone, kRelu, kSilu };

struct InvertedBottleneckShape {
  int64_t batch, height, width, inputs, hidden, outputs;
  int64_t stride;  // of the depthwise convolution, 1 or 2
  bool residual;   // inputs = outputs and stride = 1
  Activation act1, act2;

  int64_t out_height() const { return (height + stride - 1) / stride; }
  int64_t out_width() const { return (width + stride - 1) / stride; }
};

}  // namespace kernelpose
