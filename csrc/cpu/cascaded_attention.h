// CPU kernel of cascaded_attention. All tensors are contiguous; false where there is no memory.
#pragma once

#include "isa.h"
#include "kernelpose/cascaded_attention.h"
#include "kernelpose/dtype.h"

namespace kernelpose::cpu {

#define KP_DECLARE(isa_namespace)                                                                 \
  namespace isa_namespace {                                                                       \
  bool cascaded_attention_forward(const CascadedAttentionTensors& tensors,                        \
                                  const CascadedAttentionShape& shape, DType dtype, int threads); \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
