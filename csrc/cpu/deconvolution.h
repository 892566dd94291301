// CPU kernel of a deconvolution and ReLU for inference, in float32. Its weight (inputs, outputs, 4,
// 4) is packed once, into deconvolution_packed_size numbers.
// False: no memory for scratch. See kernelpose/nn/deconvolution.py.
#pragma once

#include "isa.h"
#include "kernelpose/deconvolution.h"

namespace kernelpose::cpu {

#define KP_DECLARE(isa_namespace)                                                                \
  namespace isa_namespace {                                                                      \
  int64_t deconvolution_packed_size(int64_t inputs, int64_t outputs);                            \
  void deconvolution_pack(const float* weight, int64_t inputs, int64_t outputs, float* to);      \
  bool deconvolution_forward(const float* x, const float* packed, const float* bias, float* out, \
                             const DeconvolutionShape& shape, int threads);                      \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
