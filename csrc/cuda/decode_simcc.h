// SimCC decoding.
//
//   x, y             (persons, joints, bins_x), (persons, joints, bins_y), contiguous
//   centers, scales  (persons, 2) float32, or nullptr for points of the input
//   points, scores   (persons, joints, 2), (persons, joints) float32
//
// Element types float32, float16, bfloat16; anything else is cudaErrorInvalidValue. Nothing
// synchronises or allocates, and all work is enqueued on `stream` (legal inside a graph capture).
#pragma once

#include <cuda_runtime.h>

#include "kernelpose/decode_simcc.h"
#include "kernelpose/dtype.h"

namespace kernelpose::cuda {

cudaError_t decode_simcc(const void* x, const void* y, const float* centers, const float* scales,
                         float* points, float* scores, const DecodeSimccShape& shape, DType dtype,
                         cudaStream_t stream);

}  // namespace kernelpose::cuda
