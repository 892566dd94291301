// CPU kernels of add_layer_norm, on rows that follow each other. moments (2, rows) and
// grad_parameters (2, channels), of weight and of bias, are of the compute type, float32 or, for
// float64, float64. moments may be nullptr, where no gradient is wanted, grad_sum, where it is
// zero, and grad_x, where x has the type of sum and grad_residual is the gradient of both. false
// where there is no memory left. See kernelpose/ops/add_layer_norm.py.
#pragma once

#include "isa.h"
#include "kernelpose/add_layer_norm.h"

namespace kernelpose::cpu {

#define KP_DECLARE(isa_namespace)                                                              \
  namespace isa_namespace {                                                                    \
  bool add_layer_norm_forward(const void* x, const void* residual, const void* weight,         \
                              const void* bias, void* sum, void* norm, void* moments,          \
                              const AddLayerNormShape& shape, const AddLayerNormTypes& types,  \
                              int threads);                                                    \
  bool add_layer_norm_backward(const void* grad_sum, const void* grad_norm, const void* sum,   \
                               const void* moments, const void* weight, void* grad_residual,   \
                               void* grad_x, void* grad_parameters,                            \
                               const AddLayerNormShape& shape, const AddLayerNormTypes& types, \
                               int threads);                                                   \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
