// CPU kernel of flip_merge. All tensors are contiguous; see kernelpose/ops/flip_merge.py. order:
// for each of the `joints` the joint of the mirrored input.
#pragma once

#include "isa.h"
#include "kernelpose/dtype.h"
#include "kernelpose/flip_merge.h"

namespace kernelpose::cpu {

#define KP_DECLARE(isa_namespace)                                                         \
  namespace isa_namespace {                                                               \
  void flip_merge(const void* heatmaps, const void* flipped, void* out, const int* order, \
                  int joints, const FlipMergeShape& shape, DType dtype, int threads);     \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
