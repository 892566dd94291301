// The sum of a channel gate and a spatial gate. y, out and their gradients are dense, in the memory
// format that shape.maps says; reduce_weight W1 (hidden, channels), expand_weight W2 (channels,
// hidden), spatial_weight (2, 7, 7), state (batch, shape.state()) and partials (batch,
// shape.partial()) are float32. The forward writes state, the backward partials, see
// kernelpose/dual_gate.h. workspace: dual_gate_workspace(shape) bytes in either direction.
//
// Element types float32, float16, bfloat16; anything else is cudaErrorInvalidValue. Nothing
// synchronises or allocates, and all work is enqueued on `stream` (legal inside a graph capture).
#pragma once

#include <cuda_runtime.h>

#include "kernelpose/dtype.h"
#include "kernelpose/dual_gate.h"

namespace kernelpose::cuda {

size_t dual_gate_workspace(const DualGateShape& shape);

cudaError_t dual_gate_forward(const void* y, const float* reduce_weight, const float* expand_weight,
                              const float* spatial_weight, void* out, float* state,
                              float* workspace, const DualGateShape& shape, DType dtype,
                              cudaStream_t stream);

cudaError_t dual_gate_backward(const void* grad_out, const void* y, const float* reduce_weight,
                               const float* expand_weight, const float* spatial_weight,
                               const float* state, void* grad_y, float* partials, float* workspace,
                               const DualGateShape& shape, DType dtype, cudaStream_t stream);

}  // namespace kernelpose::cuda
