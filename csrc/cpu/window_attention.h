// CPU kernels of window_attention. All tensors are contiguous; see
// kernelpose/ops/window_attention.py for their shapes. lse and the bias gradient are float, or
// double where the tensors are.
#pragma once

#include "isa.h"
#include "kernelpose/dtype.h"
#include "kernelpose/window_attention.h"

namespace kernelpose::cpu {

#define KP_DECLARE(isa_namespace)                                                                 \
  namespace isa_namespace {                                                                       \
  bool window_attention_forward(const void* qkv, const void* bias, void* out, void* lse,          \
                                const WindowAttentionShape& shape, DType dtype, int threads);     \
  bool window_attention_backward(const void* grad_out, const void* qkv, const void* bias,         \
                                 const void* out, const void* lse, void* grad_qkv,                \
                                 void* grad_bias, const WindowAttentionShape& shape, DType dtype, \
                                 int threads);                                                    \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
