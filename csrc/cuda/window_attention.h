// Windowed multi-head self-attention over a token map, and its gradient.
//
//   qkv       (batch, H, W, 3C)   channels (q, k, v) x heads x head_dim, contiguous
//   bias      (bias_rows * bias_columns, heads) float32, or nullptr
//   out       (batch, H, W, C)    the gradients have the shapes of what they are gradients of
//   lse       (batch, heads, H, W) float32: log of the sum of exp of a query's scores
//
// Element types float32, float16, bfloat16; anything else is cudaErrorInvalidValue. Nothing
// synchronises or allocates, no input is written, results are the same on every run, and all work
// is enqueued on `stream` (legal inside a graph capture). `workspace` holds at least as many bytes
// as the functions below answer, aligned to 256, and need not be initialised.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernelpose/dtype.h"
#include "kernelpose/window_attention.h"

namespace kernelpose::cuda {

int64_t window_attention_forward_workspace(const WindowAttentionShape& shape, DType dtype);
int64_t window_attention_backward_workspace(const WindowAttentionShape& shape, DType dtype,
                                            bool bias_gradient);

cudaError_t window_attention_forward(const void* qkv, const float* bias, void* out, float* lse,
                                     void* workspace, const WindowAttentionShape& shape,
                                     DType dtype, cudaStream_t stream);

// grad_bias == nullptr where its gradient is not wanted.
cudaError_t window_attention_backward(const void* grad_out, const void* qkv, const float* bias,
                                      const void* out, const float* lse, void* grad_qkv,
                                      float* grad_bias, void* workspace,
                                      const WindowAttentionShape& shape, DType dtype,
                                      cudaStream_t stream);

}  // namespace kernelpose::cuda
