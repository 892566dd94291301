// Keypoints from heatmaps; see kernelpose/ops/decode_heatmap.py.
//
//   heatmaps  (persons, joints, height, width), contiguous, float32, float16 or bfloat16; any other
//             element type is cudaErrorInvalidValue
//
// Nothing synchronises or allocates, results are the same on every run, and all work is enqueued
// on `stream` (legal inside a graph capture).
#pragma once

#include <cuda_runtime.h>

#include "kernelpose/decode_heatmap.h"
#include "kernelpose/dtype.h"

namespace kernelpose::cuda {

cudaError_t decode_heatmap(const void* heatmaps, const DecodedPoints& out,
                           const DecodeHeatmap& problem, DType dtype, cudaStream_t stream);

}  // namespace kernelpose::cuda
