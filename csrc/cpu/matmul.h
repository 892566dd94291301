// Small matrix products out of the first two cache levels, the core of the CPU attention kernels.
//
// C (m, n) = or += A (m, k) B (k, n). A is read an element at a time through any strides, so its
// transpose costs nothing. B lies in panels of kPanel columns: column j of row i stands at
// (j / kPanel) * b_panel + i * b_row + j % kPanel, which a row-major matrix satisfies with b_panel
// = kPanel. n is a whole number of vectors: callers pad it. The product is summed before it is
// added to C, so that a long sum taken in parts keeps its precision.
#pragma once

#include "simd.h"

namespace kernelpose::cpu::KP_ISA {

// A tile's accumulators, one row of B and one element of A must fit the registers.
constexpr int kPanelVectors = kRegisters == 32 ? 4 : 2;
template <class T>
constexpr int kPanel = kPanelVectors * kWidth<T>;

// Rows of the tile for a panel of so many vectors; multiples that divide a window of 64 well.
constexpr int tile_rows(int vectors) {
  if (kRegisters == 32) return vectors == 4 ? 6 : vectors == 3 ? 8 : 12;
  return vectors == 2 ? 6 : 8;
}

template <class T>
struct Strided {
  T* data;
  int64_t row;
  int64_t column;
};

template <class T, int kRows, int kVectors, bool kAdd>
inline void matmul_tile(int64_t k, Strided<const T> a, const T* b, int64_t b_row, T* c,
                        int64_t c_row) {
  Vector<T> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = Vector<T>{};
    }
  }
  for (int64_t s = 0; s < k; ++s) {
    Vector<T> row[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + s * b_row + j * kWidth<T>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const T x = a.data[i * a.row + s * a.column];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      T* const to = c + i * c_row + j * kWidth<T>;
      store(to, kAdd ? load(to) + sum[i][j] : sum[i][j]);
    }
  }
}

template <class T, int kVectors, bool kAdd>
inline void matmul_panel(int64_t m, int64_t k, Strided<const T> a, const T* b, int64_t b_row, T* c,
                         int64_t c_row) {
  constexpr int kRows = tile_rows(kVectors);
  auto advance = [&](int rows) {
    a.data += rows * a.row;
    c += rows * c_row;
    m -= rows;
  };
  while (m >= kRows) {
    matmul_tile<T, kRows, kVectors, kAdd>(k, a, b, b_row, c, c_row);
    advance(kRows);
  }
  while (m >= 4) {
    matmul_tile<T, 4, kVectors, kAdd>(k, a, b, b_row, c, c_row);
    advance(4);
  }
  while (m > 0) {
    matmul_tile<T, 1, kVectors, kAdd>(k, a, b, b_row, c, c_row);
    advance(1);
  }
}

template <class T, bool kAdd>
void matmul(int64_t m, int64_t n, int64_t k, Strided<const T> a, const T* b, int64_t b_row,
            int64_t b_panel, T* c, int64_t c_row) {
  while (n >= kPanel<T>) {
    matmul_panel<T, kPanelVectors, kAdd>(m, k, a, b, b_row, c, c_row);
    n -= kPanel<T>;
    b += b_panel;
    c += kPanel<T>;
  }
  switch (n / kWidth<T>) {
    case 1:
      return matmul_panel<T, 1, kAdd>(m, k, a, b, b_row, c, c_row);
    case 2:
      if constexpr (kPanelVectors > 2) matmul_panel<T, 2, kAdd>(m, k, a, b, b_row, c, c_row);
      return;
    case 3:
      if constexpr (kPanelVectors > 2) matmul_panel<T, 3, kAdd>(m, k, a, b, b_row, c, c_row);
      return;
  }
}

}  // namespace kernelpose::cpu::KP_ISA
