// CPU kernels of dilated_pyramid. x (batch, channels, height, width), out (batch, channels of all
// layers, or of one for the sum, ...), maps (batch, channels of all layers, ...) and their
// gradients are dense, in the memory format that the shape says; weights, biases and their
// gradients are of the compute type, float32 or, for float64, float64. False: no memory for
// scratch. See kernelpose/ops/dilated_pyramid.py.
#pragma once

#include <vector>

#include "isa.h"
#include "kernelpose/dilated_pyramid.h"
#include "kernelpose/dtype.h"

namespace kernelpose::cpu {

struct DilatedPyramidGradients {
  void* x;  // or nullptr, where nobody wants it
  std::vector<void*> weights, biases;
};

// Forward: maps are f_1, ..., f_n for the backward pass, or nullptr; only for the sum. Backward:
// they are out for the concatenation; biases are not read.
#define KP_DECLARE(isa_namespace)                                                            \
  namespace isa_namespace {                                                                  \
  bool dilated_pyramid_forward(const void* x, const DilatedPyramidLayers& layers, void* out, \
                               void* maps, const DilatedPyramidShape& shape, DType dtype,    \
                               int threads);                                                 \
  bool dilated_pyramid_backward(const void* grad_out, const void* x, const void* maps,       \
                                const DilatedPyramidLayers& layers,                          \
                                const DilatedPyramidGradients& gradients,                    \
                                const DilatedPyramidShape& shape, DType dtype, int threads); \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
