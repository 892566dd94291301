// Keypoints from heatmaps on the CPU; see kernelpose/ops/decode_heatmap.py.
#pragma once

#include "isa.h"
#include "kernelpose/decode_heatmap.h"
#include "kernelpose/dtype.h"

namespace kernelpose::cpu {

// heatmaps (persons, joints, height, width), contiguous. False where there was no memory.
#define KP_DECLARE(isa)                                                        \
  namespace isa {                                                              \
  bool decode_heatmap(const void* heatmaps, const DecodedPoints& out,          \
                      const DecodeHeatmap& problem, DType dtype, int threads); \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
