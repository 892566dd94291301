// Feature maps (batch, channels, pixels) in one of PyTorch's two memory formats: contiguous, where
// the pixels of a channel are neighbours, or channels_last, where the channels of a pixel are.
#pragma once

#include <cstdint>

#include "kernelpose/host_device.h"

namespace kernelpose {

struct Maps {
  int64_t batch, channels, pixels;
  bool channels_last;

  KP_HOST_DEVICE int64_t image() const { return channels * pixels; }  // elements of one
};

}  // namespace kernelpose
