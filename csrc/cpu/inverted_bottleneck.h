// CPU kernel of inverted_bottleneck, in float32: expand (hidden, inputs), depthwise (hidden, 9) and
// project (outputs, hidden), each with a bias. Without a depthwise weight its part is left out.
// False: no memory for scratch. See kernelpose/ops/inverted_bottleneck.py.
#pragma once

#include "isa.h"
#include "kernelpose/inverted_bottleneck.h"

namespace kernelpose::cpu {

struct InvertedBottleneckWeights {
  const float *expand, *expand_bias, *depthwise, *depthwise_bias, *project, *project_bias;
};

#define KP_DECLARE(isa_namespace)                                                                  \
  namespace isa_namespace {                                                                        \
  bool inverted_bottleneck_forward(const float* x, const InvertedBottleneckWeights& weights,       \
                                   float* out, const InvertedBottleneckShape& shape, int threads); \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
