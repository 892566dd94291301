// SCConv's spatial gate. x, out and their gradients are dense, in the memory format that shape.maps
// says; the rest is float32: weight, bias and their gradients (channels), statistics (batch,
// groups, 2): mean and reciprocal deviation, scratch 2 * batch * channels +
// batch * groups.
//
// Element types float32, float16, bfloat16, fewer than 2^31 elements in an image and at most
// kMaxUnitChannels channels in a pair of groups (in all, where the number of groups is odd);
// anything else is cudaErrorInvalidValue. Nothing synchronises or allocates, and all work is
// enqueued on `stream` (legal inside a graph capture).
#pragma once

#include <cuda_runtime.h>

#include "kernelpose/dtype.h"
#include "kernelpose/spatial_gate.h"

namespace kernelpose::cuda {

constexpr int64_t kMaxUnitChannels = 8192;  // MAX_UNIT_CHANNELS of kernelpose/ops/spatial_gate.py

cudaError_t spatial_gate_forward(const void* x, const float* weight, const float* bias, void* out,
                                 float* statistics, const SpatialGateShape& shape, DType dtype,
                                 cudaStream_t stream);

cudaError_t spatial_gate_backward(const void* grad_out, const void* x, const float* weight,
                                  const float* bias, const float* statistics, void* grad_x,
                                  float* grad_weight, float* grad_bias, float* scratch,
                                  const SpatialGateShape& shape, DType dtype, cudaStream_t stream);

}  // namespace kernelpose::cuda
