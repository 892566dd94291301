// PVT v2's attention, with its projections, of tokens on the CPU for inference, in float32: x
// (batch, height * width, channels) -> out, the same. Both channels and those of a head are
// multiples of 16. Weights are arranged by kernelpose/nn/packed_sr_attention.py; without sr, keys
// come from x as it is. False: no memory for scratch.
#pragma once

#include <cstdint>

#include "isa.h"

namespace kernelpose::cpu {

struct SrAttentionShape {
  int64_t batch, height, width, channels;
  int heads;
  int64_t ratio;  // of the reduction, at most height and width
  float eps;      // of the norm

  int64_t tokens() const { return height * width; }
  int64_t keys() const { return (height / ratio) * (width / ratio); }
};

// Matrices as panel_columns() columns each; sr has rows (row of a patch, column, channel).
struct SrAttentionWeights {
  const float *q, *q_bias, *kv, *kv_bias, *proj, *proj_bias;
  const float *sr, *sr_bias, *norm, *norm_bias;  // all nullptr where there is no reduction
};

#define KP_DECLARE(isa_namespace)                                                          \
  namespace isa_namespace {                                                                \
  bool sr_attention_forward(const float* x, const SrAttentionWeights& weights, float* out, \
                            const SrAttentionShape& shape, int threads);                   \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
