// Products of pixels and a weight that was packed once, with what follows them done in registers.
//
// A weight (outputs, inputs) lies in panels of kProductOutputs outputs, [panel][input][output],
// padded by 0. Two vectors of outputs and many pixels at once read little of the panel for each
// product, so that it may come from the second level of the cache and beyond.
#pragma once

#include "simd.h"

namespace kernelpose::cpu::KP_ISA {

constexpr int kProductVectors = 2;
constexpr int kProductOutputs = kProductVectors * kWidth<float>;
constexpr int kProductPixels = kRegisters == 32 ? 12 : 6;

// finish(pixel, output, sum) for kPixels pixels, `row` numbers apart, and the outputs of a panel.
template <int kPixels, class Finish>
inline void product_tile(const float* pixels, int64_t row, int64_t inputs, const float* panel,
                         const float* bias, const Finish& finish) {
  constexpr int n = kWidth<float>;
  FloatVector sum[kPixels][kProductVectors];
#pragma GCC unroll 12
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < kProductVectors; ++v) sum[p][v] = load(bias + v * n);
  }
  for (int64_t i = 0; i < inputs; ++i) {
    FloatVector weight[kProductVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kProductVectors; ++v) weight[v] = load(panel + i * kProductOutputs + v * n);
#pragma GCC unroll 12
    for (int p = 0; p < kPixels; ++p) {
      const float x = pixels[p * row + i];
#pragma GCC unroll 2
      for (int v = 0; v < kProductVectors; ++v) sum[p][v] += x * weight[v];
    }
  }
#pragma GCC unroll 12
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < kProductVectors; ++v) finish(p, v * n, sum[p][v]);
  }
}

// finish(pixel, output, sum) for `count` pixels and all outputs, whole panels of them; a sum is of
// the vector of outputs that begins there, its bias included.
template <class Finish>
inline void packed_product(const float* pixels, int64_t row, int64_t count, int64_t inputs,
                           int64_t outputs, const float* packed, const float* bias,
                           const Finish& finish) {
  for (int64_t o = 0; o < outputs; o += kProductOutputs) {
    const float* const panel = packed + o * inputs;
    int64_t first = 0;
    const auto here = [&](int64_t pixel, int64_t output, FloatVector sum) {
      finish(first + pixel, o + output, sum);
    };
    for (; first + kProductPixels <= count; first += kProductPixels) {
      product_tile<kProductPixels>(pixels + first * row, row, inputs, panel, bias + o, here);
    }
    for (; first + 3 <= count; first += 3) {
      product_tile<3>(pixels + first * row, row, inputs, panel, bias + o, here);
    }
    for (; first < count; ++first) {
      product_tile<1>(pixels + first * row, row, inputs, panel, bias + o, here);
    }
  }
}

}  // namespace kernelpose::cpu::KP_ISA
