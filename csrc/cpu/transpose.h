// Transposing tables that lie in memory.
#pragma once

#include <algorithm>

#include "simd.h"

namespace kernelpose::cpu::KP_ISA {

// to[c * to_row + r] = from[r * from_row + c].
template <class T>
void transpose(const T* from, int64_t rows, int64_t columns, int64_t from_row, T* to,
               int64_t to_row) {
  constexpr int n = kWidth<T>;
  int64_t r = 0;
  for (; r + n <= rows && columns >= n; r += n) {
    for (int64_t next = 0; next < columns; next += n) {
      const int64_t c = std::min(next, columns - n);  // the last square may cover some twice
      Vector<T> square[n];
      for (int i = 0; i < n; ++i) square[i] = load(from + (r + i) * from_row + c);
      transpose_square<T>(square);
      for (int i = 0; i < n; ++i) store(to + (c + i) * to_row + r, square[i]);
    }
  }
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[c * to_row + r] = from[r * from_row + c];
  }
}

}  // namespace kernelpose::cpu::KP_ISA
