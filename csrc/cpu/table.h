// Maps reduced over their pixels and over their channels in one pass. An image is a table, whose
// rows are pixels in channels_last and channels in contiguous.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "channel_passes.h"

namespace kernelpose::cpu::KP_ISA {

constexpr int kTableRows = kRegisters == 32 ? 8 : 4;  // rows that are reduced together

// A vector of numbers, or one of them.
template <class V, class T>
inline V read(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class V, class T>
inline void write(T* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

// An image as it lies.
struct Table {
  int64_t rows, columns;

  explicit Table(const Maps& maps)
      : rows(maps.channels_last ? maps.pixels : maps.channels),
        columns(maps.channels_last ? maps.channels : maps.pixels) {}
  int64_t block_rows() const {
    return round_up(std::max<int64_t>(1, kTaskElements / columns), kTableRows);
  }
  int64_t blocks() const { return (rows + block_rows() - 1) / block_rows(); }
};

// Two numbers of each of `count` rows and of each column. visit.place(values, row, column, of_row,
// of_column) takes one place into both, visit.kStart is where the second number starts and
// visit.join makes one of two second numbers; the first are sums.
template <int kInputs, class Element, class Visit>
void reduce_rows(const Element* const (&inputs)[kInputs], int64_t first, int64_t count,
                 int64_t columns, Compute<Element>* const (&of_rows)[2],
                 Compute<Element>* const (&of_columns)[2], const Visit& visit) {
  using T = Compute<Element>;
  using V = Vector<T>;
  constexpr int n = kWidth<T>;
  std::fill(of_columns[0], of_columns[0] + columns, T(0));
  std::fill(of_columns[1], of_columns[1] + columns, visit.kStart);
  const auto some_rows = [&](int64_t r, auto rows) {
    constexpr int kRows = decltype(rows)::value;
    V row[kRows][2];
    T rest[kRows][2];
    for (int i = 0; i < kRows; ++i) {
      row[i][0] = V{};
      row[i][1] = broadcast(visit.kStart);
      rest[i][0] = 0;
      rest[i][1] = visit.kStart;
    }
    const auto take = [&](int64_t c, auto& of_row, auto zero) {
      using Lanes = decltype(zero);
      Lanes column[2] = {zero, zero + visit.kStart};
      for (int i = 0; i < kRows; ++i) {
        const Values<Lanes, kInputs, Element> values(inputs, (r + i) * columns + c);
        visit.place(values.of, r + i, c, of_row[i], column);
      }
      write(of_columns[0] + c, read<Lanes>(of_columns[0] + c) + column[0]);
      write(of_columns[1] + c, visit.join(read<Lanes>(of_columns[1] + c), column[1]));
    };
    int64_t c = 0;
    for (; c + n <= columns; c += n) take(c, row, V{});
    for (; c < columns; ++c) take(c, rest, T{});
    for (int i = 0; i < kRows; ++i) {
      of_rows[0][r + i] = reduce_sum<T>(row[i][0]) + rest[i][0];
      of_rows[1][r + i] = visit.join(visit.template fold<T>(row[i][1]), rest[i][1]);
    }
  };
  int64_t r = first;
  const int64_t end = first + count;
  for (; r + kTableRows <= end; r += kTableRows) {
    some_rows(r, std::integral_constant<int, kTableRows>{});
  }
  for (; r < end; ++r) some_rows(r, std::integral_constant<int, 1>{});
}

// Sum and largest.
template <class T>
struct Peaks {
  static constexpr T kStart = -std::numeric_limits<T>::infinity();
  template <class V>
  static V join(V a, V b) {
    return maximum(a, b);
  }
  template <class U>
  static U fold(Vector<U> v) {
    return reduce_maximum<U>(v);
  }
  template <class V>
  void place(const V (&in)[1], int64_t, int64_t, V (&row)[2], V (&column)[2]) const {
    row[0] += in[0];
    row[1] = maximum(row[1], in[0]);
    column[0] += in[0];
    column[1] = maximum(column[1], in[0]);
  }
};

// Sum of grad_out y, and how many values are as large as the largest.
template <class T>
struct Shares {
  static constexpr T kStart = 0;
  const T* row_largest;
  const T* column_largest;
  template <class V>
  static V join(V a, V b) {
    return a + b;
  }
  template <class U>
  static U fold(Vector<U> v) {
    return reduce_sum<U>(v);
  }
  template <class V>
  void place(const V (&in)[2], int64_t r, int64_t c, V (&row)[2], V (&column)[2]) const {
    const V zero = V{}, one = zero + 1, product = in[0] * in[1];
    row[0] += product;
    row[1] += in[1] == row_largest[r] + zero ? one : zero;
    column[0] += product;
    column[1] += in[1] == read<V>(column_largest + c) ? one : zero;
  }
};

}  // namespace kernelpose::cpu::KP_ISA
