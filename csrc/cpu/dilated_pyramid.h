// CPU kernels of dilated_pyramid. x (batch, channels, height, width), out (batch, channels of all
// layers, or of one for the sum, ...) and maps (batch, channels of all layers, ...) are dense, in
// the memory format that the shape says; weights and biases are of the compute type, float32 or,
// for float64, float64. maps: f_1, ..., f_n for the backward pass, or nullptr; only for the sum.
// False: no memory for scratch. See kernelpose/ops/dilated_pyramid.py.
#pragma once

#include "isa.h"
#include "kernelpose/dilated_pyramid.h"
#include "kernelpose/dtype.h"

namespace kernelpose::cpu {

#define KP_DECLARE(isa_namespace)                                                                 \
  namespace isa_namespace {                                                                       \
  bool dilated_pyramid_forward(const void* x, const DilatedPyramidLayers& layers, void* out,      \
                               void* maps, const DilatedPyramidShape& shape, DType dtype,         \
                               int threads);                                                      \
  void dilated_pyramid_mask(const void* grad_out, const void* carry, const void* map, void* grad, \
                            const PyramidRows& rows, DType dtype, int threads);                   \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
