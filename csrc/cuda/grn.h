// Global response normalisation. x, out and their gradients are dense, in the memory format that
// shape.maps says; gamma, beta (channels), norms (batch, channels) and sums (3, batch, channels)
// are float32. The forward writes norms, the backward sums: over the pixels of grad_out x, of
// grad_out, and each image's part of the gradient of gamma; over the images they are summed by the
// caller.
//
// Element types float32, float16, bfloat16; anything else is cudaErrorInvalidValue. Nothing
// synchronises or allocates, and all work is enqueued on `stream` (legal inside a graph capture).
#pragma once

#include <cuda_runtime.h>

#include "kernelpose/dtype.h"
#include "kernelpose/grn.h"

namespace kernelpose::cuda {

cudaError_t grn_forward(const void* x, const float* gamma, const float* beta, void* out,
                        float* norms, const GrnShape& shape, DType dtype, cudaStream_t stream);

cudaError_t grn_backward(const void* grad_out, const void* x, const float* gamma,
                         const float* norms, float* sums, void* grad_x, const GrnShape& shape,
                         DType dtype, cudaStream_t stream);

}  // namespace kernelpose::cuda
