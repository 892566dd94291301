// fc2(GELU(dwconv(fc1(x)))) of tokens on the CPU for inference, in float32: x (batch, height *
// width, inputs) -> out (batch, height * width, outputs), outputs a multiple of 16. The weights, of
// `hidden` channels in whole kMixFfnBlock, are arranged by
// kernelpose/nn/packed_mix_ffn.py. False:
// no memory for scratch.
#pragma once

#include <cstdint>

#include "isa.h"

namespace kernelpose::cpu {

constexpr int64_t kMixFfnBlock = 64;  // hidden channels that are computed together

struct MixFfnShape {
  int64_t batch, height, width, inputs, hidden, outputs;
};

// Matrices as (panel, row of the right factor, its columns): inputs rows and hidden columns, hidden
// rows and outputs columns. depthwise (hidden, 9).
struct MixFfnWeights {
  const float *fc1, *fc1_bias, *depthwise, *depthwise_bias, *fc2, *fc2_bias;
};

#define KP_DECLARE(isa_namespace)                                                \
  namespace isa_namespace {                                                      \
  int64_t panel_columns();                                                       \
  bool mix_ffn_forward(const float* x, const MixFfnWeights& weights, float* out, \
                       const MixFfnShape& shape, int threads);                   \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
