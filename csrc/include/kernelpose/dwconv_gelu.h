// out = GELU(z), z = bias + the depthwise 3x3 convolution of x with zeros around, on tokens: x, out
// (batch, height * width, channels), where the channels of a pixel are neighbours.
//
// With g = grad_out GELU'(z), the gradient of x is g convolved with the kernel turned by 180
// degrees; that of a tap is the sum over images and pixels of g x there, that of the bias the sum
// of g.
#pragma once

#include <cstdint>

#include "kernelpose/host_device.h"

namespace kernelpose {

constexpr int kDwconvTaps = 9;
constexpr int kDwconvSums = kDwconvTaps + 1;  // of a channel's gradients: the taps, the bias

struct DwconvGeluShape {
  int64_t batch, height, width, channels;

  KP_HOST_DEVICE int64_t image() const { return height * width * channels; }  // elements of one
};

}  // namespace kernelpose
