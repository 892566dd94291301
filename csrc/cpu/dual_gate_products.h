// What dual_gate makes of an image's means and largest values: products of a matrix with vectors,
// and correlations of small maps with one 7x7 kernel.
#pragma once

#include <algorithm>

#include "kernelpose/dual_gate.h"
#include "simd.h"

namespace kernelpose::cpu::KP_ISA {

// y[i][r] = row r of the matrix times x[i].
template <int kInputs, class T>
inline void multiply(const T* matrix, int64_t rows, int64_t columns, const T* const (&x)[kInputs],
                     T* const (&y)[kInputs]) {
  constexpr int n = kWidth<T>;
  const auto some_rows = [&](int64_t r, auto count) {
    constexpr int kCount = decltype(count)::value;
    Vector<T> sum[kCount][kInputs] = {};
    T rest[kCount][kInputs] = {};
    int64_t c = 0;
    for (; c + n <= columns; c += n) {
      for (int k = 0; k < kCount; ++k) {
        const Vector<T> row = load(matrix + (r + k) * columns + c);
        for (int i = 0; i < kInputs; ++i) sum[k][i] += row * load(x[i] + c);
      }
    }
    for (; c < columns; ++c) {
      for (int k = 0; k < kCount; ++k) {
        for (int i = 0; i < kInputs; ++i) rest[k][i] += matrix[(r + k) * columns + c] * x[i][c];
      }
    }
    for (int k = 0; k < kCount; ++k) {
      for (int i = 0; i < kInputs; ++i) y[i][r + k] = reduce_sum<T>(sum[k][i]) + rest[k][i];
    }
  };
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) some_rows(r, std::integral_constant<int, 4>{});
  for (; r < rows; ++r) some_rows(r, std::integral_constant<int, 1>{});
}

// y[i][c] = column c of the matrix times x[i].
template <int kInputs, class T>
inline void multiply_transposed(const T* matrix, int64_t rows, int64_t columns,
                                const T* const (&x)[kInputs], T* const (&y)[kInputs]) {
  constexpr int n = kWidth<T>;
  const auto some_columns = [&](int64_t c, auto count) {
    constexpr int kCount = decltype(count)::value;
    Vector<T> sum[kCount][kInputs] = {};
    for (int64_t r = 0; r < rows; ++r) {
      for (int k = 0; k < kCount; ++k) {
        const Vector<T> row = load(matrix + r * columns + c + k * n);
        for (int i = 0; i < kInputs; ++i) sum[k][i] += x[i][r] * row;
      }
    }
    for (int k = 0; k < kCount; ++k) {
      for (int i = 0; i < kInputs; ++i) store(y[i] + c + k * n, sum[k][i]);
    }
  };
  int64_t c = 0;
  for (; c + 3 * n <= columns; c += 3 * n) some_columns(c, std::integral_constant<int, 3>{});
  for (; c + n <= columns; c += n) some_columns(c, std::integral_constant<int, 1>{});
  for (; c < columns; ++c) {
    for (int i = 0; i < kInputs; ++i) {
      y[i][c] = 0;
      for (int64_t r = 0; r < rows; ++r) y[i][c] += matrix[r * columns + c] * x[i][r];
    }
  }
}

// A map with a margin of zeros. Its pixels are taken as one long row, so that a vector may run over
// the end of a row of the map: what it computes there nobody reads.
template <class T>
struct Padded {
  int64_t height, width;

  int64_t row() const { return width + 2 * kGateMargin; }
  int64_t results() const { return height * row(); }  // of a correlation; so many are valid
  int64_t result_size() const { return round_up(results(), 4 * kWidth<T>); }
  int64_t size() const { return result_size() + (kGateKernel - 1) * (row() + 1); }
  int64_t inside() const { return kGateMargin * (row() + 1); }  // place of the first pixel

  void fill(const T* map, T* to) const {
    std::fill(to, to + size(), T(0));
    for (int64_t h = 0; h < height; ++h) {
      std::copy(map + h * width, map + (h + 1) * width, to + inside() + h * row());
    }
  }

  // out (+)= correlation with a kernel, read from its end where step is -1.
  template <bool kAdd>
  void correlate(const T* map, const T* kernel, int step, T* out) const {
    constexpr int n = kWidth<T>;
    for (int64_t i = 0; i < results(); i += 4 * n) {
      Vector<T> sum[4];
      for (int k = 0; k < 4; ++k) sum[k] = kAdd ? load(out + i + k * n) : Vector<T>{};
      const T* weight = kernel;
      for (int h = 0; h < kGateKernel; ++h) {
        for (int w = 0; w < kGateKernel; ++w, weight += step) {
          const T* const from = map + i + h * row() + w;
          for (int k = 0; k < 4; ++k) sum[k] += *weight * load(from + k * n);
        }
      }
      for (int k = 0; k < 4; ++k) store(out + i + k * n, sum[k]);
    }
  }

  // The kernel's gradient, of the maps and of the padded gradient of the correlation.
  void correlate_maps(const T* map, const T* grad, T* kernel) const {
    constexpr int n = kWidth<T>;
    const T* const inner = grad + inside();
    for (int h = 0; h < kGateKernel; ++h) {
      Vector<T> sum[kGateKernel] = {};
      const T* const from = map + h * row();
      // What a vector reads past the last pixel's row is the margin's zeros.
      for (int64_t i = 0; i < results(); i += n) {
        const Vector<T> g = load(inner + i);
        for (int w = 0; w < kGateKernel; ++w) sum[w] += g * load(from + i + w);
      }
      for (int w = 0; w < kGateKernel; ++w) *kernel++ = reduce_sum<T>(sum[w]);
    }
  }
};

}  // namespace kernelpose::cpu::KP_ISA
