// CPU kernels of spatial_gate. x, out and their gradients are dense, in the memory format that
// shape.maps says; the rest is of the compute type, float32 or, for float64, float64: weight, bias
// and their gradients (channels), statistics (batch, groups, 2): mean and reciprocal deviation.
// scratch (2, batch, channels) or more. See kernelpose/ops/spatial_gate.py.
#pragma once

#include "isa.h"
#include "kernelpose/dtype.h"
#include "kernelpose/spatial_gate.h"

namespace kernelpose::cpu {

#define KP_DECLARE(isa_namespace)                                                           \
  namespace isa_namespace {                                                                 \
  void spatial_gate_forward(const void* x, const void* weight, const void* bias, void* out, \
                            void* statistics, void* scratch, const SpatialGateShape& shape, \
                            DType dtype, int threads);                                      \
  void spatial_gate_backward(const void* grad_out, const void* x, const void* weight,       \
                             const void* bias, const void* statistics, void* grad_x,        \
                             void* grad_weight, void* grad_bias, void* scratch,             \
                             const SpatialGateShape& shape, DType dtype, int threads);      \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
