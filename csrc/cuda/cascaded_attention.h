// Attention of groups of channels in a cascade, to keys and values of a reduced map; no gradient.
//
//   x, out               (batch, height, width, groups, d), contiguous; d: group_width
//   reduce_weight, _bias (groups, d, ratio, ratio) and (groups, d)
//   q_, out_weight       (groups, d, d)
//   kv_weight            (groups, 2 d, d): keys, then values
//   kv_bias              (groups, 2 d)
//   q_, out_, norm_bias, norm_weight: (groups, d)
//
// Element types float32, float16, bfloat16; d a multiple of 8 up to 128; ratio up to 255; tensors
// aligned to 16 bytes: anything else is cudaErrorInvalidValue. Nothing synchronises or allocates,
// no input is written, results are the same on every run, and all work is enqueued on `stream`
// (legal inside a graph capture). `workspace` holds at least as many bytes as the function below
// answers, aligned to 256, and need not be initialised.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernelpose/cascaded_attention.h"
#include "kernelpose/dtype.h"

namespace kernelpose::cuda {

int64_t cascaded_attention_workspace(const CascadedAttentionShape& shape, DType dtype);

cudaError_t cascaded_attention_forward(const CascadedAttentionTensors& tensors, void* workspace,
                                       const CascadedAttentionShape& shape, DType dtype,
                                       cudaStream_t stream);

}  // namespace kernelpose::cuda
