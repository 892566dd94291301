// The flip test's mean. heatmaps, flipped, out: (maps, rows, width), contiguous; map m of out is
// the mean of heatmaps' map m and of flipped's map of joint order[m % joints] of the same person,
// mirrored.
//
// Element types float32, float16, bfloat16 and at most kMaxFlipJoints joints; anything else is
// cudaErrorInvalidValue. Nothing synchronises or allocates, `order` is host memory that the call
// reads before it returns, and all work is enqueued on `stream` (legal inside a graph capture).
#pragma once

#include <cuda_runtime.h>

#include "kernelpose/dtype.h"
#include "kernelpose/flip_merge.h"

namespace kernelpose::cuda {

constexpr int kMaxFlipJoints = 1024;  // MAX_JOINTS of kernelpose/ops/flip_merge.py

cudaError_t flip_merge(const void* heatmaps, const void* flipped, void* out, const int* order,
                       int joints, const FlipMergeShape& shape, DType dtype, cudaStream_t stream);

}  // namespace kernelpose::cuda
