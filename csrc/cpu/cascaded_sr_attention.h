// CPU kernel of HEViTPose's attention for inference, in float32: cascaded_attention into its
// tensors' `out`, and then out = residual + product of that with a weight, which packed_product.h
// lays out, its bias behind it. Channels are a multiple of depthwise_ffn_panel. False: no memory
// for scratch. See kernelpose/nn/packed_cascade.py.
#pragma once

#include "isa.h"
#include "kernelpose/cascaded_attention.h"

namespace kernelpose::cpu {

#define KP_DECLARE(isa_namespace)                                                              \
  namespace isa_namespace {                                                                    \
  bool cascaded_sr_attention_forward(const CascadedAttentionTensors& tensors,                  \
                                     const CascadedAttentionShape& shape, const float* packed, \
                                     const float* residual, float* out, int threads);          \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
