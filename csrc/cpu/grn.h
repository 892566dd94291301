// CPU kernels of grn. x, out and their gradients are dense, in the memory format that shape.maps
// says; gamma, beta (channels) and norms (batch, channels) are of the compute type, float32 or, for
// float64, float64. sums (3, batch, channels): over the pixels of grad_out x, of grad_out, and each
// image's part of the gradient of gamma. See kernelpose/ops/grn.py.
#pragma once

#include "isa.h"
#include "kernelpose/dtype.h"
#include "kernelpose/grn.h"

namespace kernelpose::cpu {

#define KP_DECLARE(isa_namespace)                                                               \
  namespace isa_namespace {                                                                     \
  void grn_forward(const void* x, const void* gamma, const void* beta, void* out, void* norms,  \
                   const GrnShape& shape, DType dtype, int threads);                            \
  void grn_backward(const void* grad_out, const void* x, const void* gamma, const void* norms,  \
                    void* sums, void* grad_x, const GrnShape& shape, DType dtype, int threads); \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
