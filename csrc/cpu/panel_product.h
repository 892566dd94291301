// Products with a weight that was arranged in panels of columns once, see kernelpose/nn/panels.py.
#pragma once

#include <algorithm>

#include "matmul.h"

namespace kernelpose::cpu::KP_ISA {

// A matrix (inputs, outputs) in float32.
struct PackedMatrix {
  const float* data;
  int64_t inputs;

  // From a row, and a column that begins a panel, on.
  const float* at(int64_t row, int64_t column) const {
    return data + column * inputs + row * kPanel<float>;
  }
};

// out (rows, columns) = bias in every row.
inline void fill_rows(const float* bias, int64_t rows, int64_t columns, float* out,
                      int64_t out_row) {
  for (int64_t r = 0; r < rows; ++r) std::copy_n(bias, columns, out + r * out_row);
}

// out (rows, columns) += x (rows, depth) times the weight's part that begins at (first, column), so
// deep at a time that a panel stays in the first level of the cache.
inline void add_product(int64_t rows, int64_t columns, int64_t depth, const float* x, int64_t x_row,
                        const PackedMatrix& weight, int64_t first, int64_t column, float* out,
                        int64_t out_row) {
  constexpr int64_t kDepth = 128;
  for (int64_t k = 0; k < depth; k += kDepth) {
    matmul<float, true>(rows, columns, std::min(kDepth, depth - k), {x + k, x_row, 1},
                        weight.at(first + k, column), kPanel<float>, weight.inputs * kPanel<float>,
                        out, out_row);
  }
}

}  // namespace kernelpose::cpu::KP_ISA
