// A 3x3 convolution in groups, with padding 1 and stride 1, plus a dense 1x1 convolution of the
// same maps, on the CPU in float32: x (batch, height, width, inputs) -> out (batch, height, width,
// outputs). Both inputs and outputs of a group are multiples of 32. packed: the transformed
// weights, see kernelpose/ops/_winograd.py. False: no memory for scratch.
#pragma once

#include <cstdint>

#include "isa.h"

namespace kernelpose::cpu {

struct WinogradConvShape {
  int64_t batch, inputs, outputs, height, width, groups;
};

#define KP_DECLARE(isa_namespace)                                          \
  namespace isa_namespace {                                                \
  int64_t winograd_conv_outputs(); /* whose weights are packed together */ \
  bool winograd_conv(const float* x, const float* packed, float* out,      \
                     const WinogradConvShape& shape, int threads);         \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
