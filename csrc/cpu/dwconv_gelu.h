// CPU kernels of dwconv_gelu. x, out and their gradients are (batch, height * width, channels); the
// rest is of the compute type, float32 or, for float64, float64: weight (channels, 9), bias
// (channels), and partial (batch, 10, channels), each image's part of the gradients of those.
// False: no memory for scratch. See kernelpose/ops/dwconv_gelu.py.
#pragma once

#include "isa.h"
#include "kernelpose/dtype.h"
#include "kernelpose/dwconv_gelu.h"

namespace kernelpose::cpu {

#define KP_DECLARE(isa_namespace)                                                          \
  namespace isa_namespace {                                                                \
  bool dwconv_gelu_forward(const void* x, const void* weight, const void* bias, void* out, \
                           const DwconvGeluShape& shape, DType dtype, int threads);        \
  bool dwconv_gelu_backward(const void* grad_out, const void* x, const void* weight,       \
                            const void* bias, void* partial, void* grad_x,                 \
                            const DwconvGeluShape& shape, DType dtype, int threads);       \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
