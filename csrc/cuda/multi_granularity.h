// Depthwise convolutions of three sizes and their grouped mix. x, out and their gradients are
// dense, in the memory format that shape.maps says; the rest is float32: weights of the three
// branches (channels, side, side), biases (channels), mix_weight (channels, 3 channels / groups),
// mix_bias (channels), and their gradients. workspace of the backward: as many bytes as the
// function of that name says on the same device, aligned to 16.
//
// Element types float32, float16, bfloat16; another one, an image of 2^31 elements or a group of
// more than kMaxGroupChannels is cudaErrorInvalidValue. Nothing synchronises or allocates, and all
// work is enqueued on `stream` (legal inside a graph capture).
#pragma once

#include <cuda_runtime.h>

#include "kernelpose/dtype.h"
#include "kernelpose/multi_granularity.h"

namespace kernelpose::cuda {

constexpr int kMaxGroupChannels = 96;  // known to kernelpose/ops/multi_granularity.py

struct MultiGranularityWeights {
  const float* weights[kBranches];
  const float* biases[kBranches];
  const float* mix_weight;
  const float* mix_bias;
};

struct MultiGranularityGradients {
  void* x;
  float* weights[kBranches];
  float* biases[kBranches];
  float* mix_weight;
  float* mix_bias;
};

cudaError_t multi_granularity_forward(const void* x, const MultiGranularityWeights& weights,
                                      void* out, const MultiGranularityShape& shape, DType dtype,
                                      cudaStream_t stream);

int64_t multi_granularity_backward_workspace(const MultiGranularityShape& shape, DType dtype);

cudaError_t multi_granularity_backward(const void* grad_out, const void* x,
                                       const MultiGranularityWeights& weights,
                                       const MultiGranularityGradients& gradients, void* workspace,
                                       const MultiGranularityShape& shape, DType dtype,
                                       cudaStream_t stream);

}  // namespace kernelpose::cuda
