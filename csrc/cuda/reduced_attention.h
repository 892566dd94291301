// Multi-head attention of many queries to few keys and values, and its gradient.
//
//   q         (batch, queries, heads, head_dim), contiguous
//   kv        (batch, keys, 2, heads, head_dim): keys, then values
//   out       as q; the gradients have the shapes of what they are gradients of
//   lse       (batch, heads, queries) float32: log2 of the sum of exp of a query's scores; nullptr
//             in the forward pass where nobody wants it
//
// Element types float32, float16, bfloat16; anything else is cudaErrorInvalidValue. Nothing
// synchronises or allocates, no input is written, results are the same on every run, and all work
// is enqueued on `stream` (legal inside a graph capture). `workspace` holds at least as many bytes
// as the function below answers, aligned to 256, and need not be initialised.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernelpose/dtype.h"
#include "kernelpose/reduced_attention.h"

namespace kernelpose::cuda {

int64_t reduced_attention_backward_workspace(const ReducedAttentionShape& shape, DType dtype);

cudaError_t reduced_attention_forward(const void* q, const void* kv, void* out, float* lse,
                                      const ReducedAttentionShape& shape, DType dtype,
                                      cudaStream_t stream);

cudaError_t reduced_attention_backward(const void* grad_out, const void* q, const void* kv,
                                       const float* lse, void* grad_q, void* grad_kv,
                                       void* workspace, const ReducedAttentionShape& shape,
                                       DType dtype, cudaStream_t stream);

}  // namespace kernelpose::cuda
