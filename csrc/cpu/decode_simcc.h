// CPU kernel of decode_simcc. All tensors are contiguous; see kernelpose/ops/decode_simcc.py.
// centers and scales are nullptr for points of the input.
#pragma once

#include "isa.h"
#include "kernelpose/decode_simcc.h"
#include "kernelpose/dtype.h"

namespace kernelpose::cpu {

#define KP_DECLARE(isa_namespace)                                                             \
  namespace isa_namespace {                                                                   \
  void decode_simcc(const void* x, const void* y, const float* centers, const float* scales,  \
                    float* points, float* scores, const DecodeSimccShape& shape, DType dtype, \
                    int threads);                                                             \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
