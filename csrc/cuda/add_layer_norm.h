// Residual addition and LayerNorm, on rows that follow each other. moments (2, rows) and parts
// (add_layer_norm_parts(), 2, channels) are float32; the sum of parts over its first dimension, in
// one order, is the gradient of weight and of bias, which is the caller's to take. moments may be
// nullptr, where no gradient is wanted, grad_sum, where it is zero, and grad_x, where x has the
// type of sum and grad_residual is the gradient of both.
//
// Types as kernelpose/add_layer_norm.h says, float64 excepted; anything else is
// cudaErrorInvalidValue. Nothing synchronises or allocates, and all work is enqueued on `stream`
// (legal inside a graph capture).
#pragma once

#include <cuda_runtime.h>

#include "kernelpose/add_layer_norm.h"

namespace kernelpose::cuda {

cudaError_t add_layer_norm_forward(const void* x, const void* residual, const void* weight,
                                   const void* bias, void* sum, void* norm, float* moments,
                                   const AddLayerNormShape& shape, const AddLayerNormTypes& types,
                                   cudaStream_t stream);

// How many blocks share the rows backward.
int64_t add_layer_norm_parts(const AddLayerNormShape& shape, const AddLayerNormTypes& types);

cudaError_t add_layer_norm_backward(const void* grad_sum, const void* grad_norm, const void* sum,
                                    const float* moments, const void* weight, void* grad_residual,
                                    void* grad_x, float* parts, const AddLayerNormShape& shape,
                                    const AddLayerNormTypes& types, cudaStream_t stream);

}  // namespace kernelpose::cuda
