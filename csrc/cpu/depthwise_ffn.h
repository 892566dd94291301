// CPU kernel of half a block of HEViTPose for inference, in float32. Channels and hidden are
// multiples of depthwise_ffn_panel, the outputs of a panel. `packed` holds the nine taps (9,
// channels) and their bias, then expand's panels and bias, then project's; see packed_product.h.
// False: no memory for scratch. See kernelpose/nn/depthwise_ffn.py.
#pragma once

#include "isa.h"
#include "kernelpose/depthwise_ffn.h"

namespace kernelpose::cpu {

#define KP_DECLARE(isa_namespace)                                             \
  namespace isa_namespace {                                                   \
  int64_t depthwise_ffn_panel();                                              \
  bool depthwise_ffn_forward(const float* x, const float* packed, float* out, \
                             const DepthwiseFFNShape& shape, int threads);    \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
