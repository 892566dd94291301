// CRU's fusion. y1, y2, out and their gradients are dense, in the memory format that shape.maps
// says; means and products (batch, 2, channels) are float32. The forward writes means, the backward
// products: over the pixels of y1, y2 and of grad_out times each.
//
// Element types float32, float16, bfloat16; anything else is cudaErrorInvalidValue. Nothing
// synchronises or allocates, and all work is enqueued on `stream` (legal inside a graph capture).
#pragma once

#include <cuda_runtime.h>

#include "kernelpose/channel_fuse.h"
#include "kernelpose/dtype.h"

namespace kernelpose::cuda {

cudaError_t channel_fuse_forward(const void* y1, const void* y2, void* out, float* means,
                                 const ChannelFuseShape& shape, DType dtype, cudaStream_t stream);

cudaError_t channel_fuse_backward(const void* grad_out, const void* y1, const void* y2,
                                  const float* means, float* products, void* grad_y1, void* grad_y2,
                                  const ChannelFuseShape& shape, DType dtype, cudaStream_t stream);

}  // namespace kernelpose::cuda
