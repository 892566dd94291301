// CPU kernels of reduced_attention. All tensors are contiguous; see
// kernelpose/ops/reduced_attention.py for their shapes. lse, log2 of the sum
// of exp of a query's scores, is of the compute type, and null where
// nobody wants it.
#pragma once

#include "isa.h"
#include "kernelpose/dtype.h"
#include "kernelpose/reduced_attention.h"

namespace kernelpose::cpu {

#define KP_DECLARE(isa_namespace)                                                                \
  namespace isa_namespace {                                                                      \
  bool reduced_attention_forward(const void* q, const void* kv, void* out, void* lse,            \
                                 const ReducedAttentionShape& shape, DType dtype, int threads);  \
  bool reduced_attention_backward(const void* grad_out, const void* q, const void* kv,           \
                                  const void* lse, void* grad_q, void* grad_kv,                  \
                                  const ReducedAttentionShape& shape, DType dtype, int threads); \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
