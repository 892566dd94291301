// CPU kernels of dual_gate. y, out and their gradients are dense, in the memory format that
// shape.maps says; the rest is of the compute type, float32 or, for float64, float64: reduce_weight
// W1 (hidden, channels), expand_weight W2 (channels, hidden), spatial_weight (2, 7, 7), state
// (batch, shape.state()), partials (batch, shape.partial()). False: no memory for scratch. See
// kernelpose/ops/dual_gate.py.
#pragma once

#include "isa.h"
#include "kernelpose/dtype.h"
#include "kernelpose/dual_gate.h"

namespace kernelpose::cpu {

#define KP_DECLARE(isa_namespace)                                                             \
  namespace isa_namespace {                                                                   \
  bool dual_gate_forward(const void* y, const void* reduce_weight, const void* expand_weight, \
                         const void* spatial_weight, void* out, void* state,                  \
                         const DualGateShape& shape, DType dtype, int threads);               \
  bool dual_gate_backward(const void* grad_out, const void* y, const void* reduce_weight,     \
                          const void* expand_weight, const void* spatial_weight,              \
                          const void* state, void* grad_y, void* partials,                    \
                          const DualGateShape& shape, DType dtype, int threads);              \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
