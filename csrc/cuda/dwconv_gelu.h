// Depthwise 3x3 convolution and GELU of tokens. x, out and their gradients are (batch, height *
// width, channels), dense; weight (channels, 9), bias (channels) and partial
// (dwconv_gelu_parts(shape), 10, channels), parts of the gradients of those two, are float32.
//
// Element types float32, float16, bfloat16; anything else is cudaErrorInvalidValue. Nothing
// synchronises or allocates, and all work is enqueued on `stream` (legal inside a graph capture).
#pragma once

#include <cuda_runtime.h>

#include "kernelpose/dtype.h"
#include "kernelpose/dwconv_gelu.h"

namespace kernelpose::cuda {

int64_t dwconv_gelu_parts(const DwconvGeluShape& shape);

cudaError_t dwconv_gelu_forward(const void* x, const float* weight, const float* bias, void* out,
                                const DwconvGeluShape& shape, DType dtype, cudaStream_t stream);

cudaError_t dwconv_gelu_backward(const void* grad_out, const void* x, const float* weight,
                                 const float* bias, float* partial, void* grad_x,
                                 const DwconvGeluShape& shape, DType dtype, cudaStream_t stream);

}  // namespace kernelpose::cuda
