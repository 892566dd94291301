// Crops of persons on images, normalised; see kernelpose/ops/crop_normalize.py.
#pragma once

#include "isa.h"
#include "kernelpose/crop_normalize.h"
#include "kernelpose/dtype.h"

namespace kernelpose::cpu {

constexpr int64_t kAllUsable = -1, kNoMemory = -2;

// crops (persons, 3, height, width). The images' pixels are packed: pixel stride 3, channel stride
// 1. Returns the first person that has no crop, and then leaves `crops` alone; or one of the above.
#define KP_DECLARE(isa_namespace)                                                     \
  namespace isa_namespace {                                                           \
  int64_t crop_normalize(const ImageSet& images, const Persons& persons, void* crops, \
                         const CropShape& shape, DType dtype, int threads);           \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
