// CPU kernels of multi_granularity. x, out and their gradients are dense, in the memory format that
// shape.maps says; the rest is of the compute type, float32 or, for float64, float64: weights of
// the three branches (channels, side, side), biases (channels), mix_weight (channels, 3 channels /
// groups), mix_bias (channels), and their gradients. False: no memory for scratch. See
// kernelpose/ops/multi_granularity.py.
#pragma once

#include "isa.h"
#include "kernelpose/dtype.h"
#include "kernelpose/multi_granularity.h"

namespace kernelpose::cpu {

struct MultiGranularityWeights {
  const void* weights[kBranches];
  const void* biases[kBranches];
  const void* mix_weight;
  const void* mix_bias;
};

struct MultiGranularityGradients {
  void* x;
  void* weights[kBranches];
  void* biases[kBranches];
  void* mix_weight;
  void* mix_bias;
};

#define KP_DECLARE(isa_namespace)                                                                  \
  namespace isa_namespace {                                                                        \
  bool multi_granularity_forward(const void* x, const MultiGranularityWeights& weights, void* out, \
                                 const MultiGranularityShape& shape, DType dtype, int threads);    \
  bool multi_granularity_backward(const void* grad_out, const void* x,                             \
                                  const MultiGranularityWeights& weights,                          \
                                  const MultiGranularityGradients& gradients,                      \
                                  const MultiGranularityShape& shape, DType dtype, int threads);   \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
