// Maps reduced over their pixels and over their channels in one pass. An image is a table, whose
// rows are pixels in channels_last and channels in contiguous.
//
// A block takes kRows rows of one image, a warp each kWarps-th of them, and walks over the columns:
//
//   row 0 | warp 0: 32 lanes of N columns | the next 32 N columns | ...
//   row 1 | warp 1                        |
//
// What a column has in a block goes through shared memory to the workspace, (blocks of an image, 2,
// columns), for a later kernel to join; what a row has is complete. No atomics: one order of sums.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

#include "kernelpose/launch.cuh"
#include "kernelpose/maps.h"
#include "kernelpose/numerics.cuh"
#include "kernelpose/vector.cuh"

namespace kernelpose::table {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kWarpRows = 4, kRows = kWarps * kWarpRows;

struct Table {
  int64_t rows, columns;

  KP_HOST_DEVICE explicit Table(const Maps& maps)
      : rows(maps.channels_last ? maps.pixels : maps.channels),
        columns(maps.channels_last ? maps.channels : maps.pixels) {}
  KP_HOST_DEVICE int64_t blocks() const { return (rows + kRows - 1) / kRows; }
  KP_HOST_DEVICE int64_t workspace() const { return blocks() * 2 * columns; }  // floats of an image
};

// Two numbers of each row and each column. Op: Element, kInputs, maps, inputs, columns (the
// workspace); kStart, where the second number starts, and join(a, b), which makes one of two second
// numbers (the first are sums); Known row(image, r) and column(image, c), what is known of either;
// place(values, known of the row, of the column, of_row, of_column) takes one place into both;
// finish(image, row, of_row).
template <class Op, int N>
__global__ void __launch_bounds__(kThreads, 3) reduce_table(const Op op) {
  using T = typename Op::Element;
  KP_DYNAMIC_SHARED(float, shared);  // (kWarps, 2, 32 N)
  constexpr int kTile = 32 * N;
  const Table table(op.maps);
  const int64_t image = blockIdx.x / table.blocks(), block = blockIdx.x % table.blocks();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float row[kWarpRows][2];
#pragma unroll
  for (int i = 0; i < kWarpRows; ++i) {
    row[i][0] = 0.f;
    row[i][1] = Op::kStart;
  }
  float* const own = op.columns + (image * table.blocks() + block) * 2 * table.columns;
  for (int64_t first = 0; first < table.columns; first += kTile) {
    const int64_t c = first + lane * N;
    float column[N][2];
    typename Op::Known of_columns[N];
#pragma unroll
    for (int e = 0; e < N; ++e) {
      column[e][0] = 0.f;
      column[e][1] = Op::kStart;
    }
    if (c < table.columns) {
#pragma unroll
      for (int e = 0; e < N; ++e) of_columns[e] = op.column(image, c + e);
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i) {
        const int64_t r = block * kRows + i * kWarps + warp;
        if (r >= table.rows) break;
        const auto of_row = op.row(image, r);
        ElementVector<T, N> loaded[Op::kInputs];
#pragma unroll
        for (int k = 0; k < Op::kInputs; ++k) {
          loaded[k] = load_vector<N>(op.inputs[k] + (image * table.rows + r) * table.columns + c);
        }
#pragma unroll
        for (int e = 0; e < N; ++e) {
          float values[Op::kInputs];
#pragma unroll
          for (int k = 0; k < Op::kInputs; ++k) values[k] = to_float(loaded[k].values[e]);
          op.place(values, of_row, of_columns[e], row[i], column[e]);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < N; ++e) {
#pragma unroll
      for (int k = 0; k < 2; ++k) shared[(warp * 2 + k) * kTile + e * 32 + lane] = column[e][k];
    }
    __syncthreads();
    for (int t = threadIdx.x; t < kTile && first + t < table.columns; t += kThreads) {
      const int at = t % N * 32 + t / N;
      float sum = 0.f, second = Op::kStart;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sum += shared[w * 2 * kTile + at];
        second = Op::join(second, shared[(w * 2 + 1) * kTile + at]);
      }
      own[first + t] = sum;
      own[table.columns + first + t] = second;
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kWarpRows; ++i) {
    const int64_t r = block * kRows + i * kWarps + warp;
    if (r >= table.rows) break;
#pragma unroll
    for (int offset = 16; offset >= 1; offset /= 2) {
      row[i][0] += __shfl_xor_sync(0xffffffffu, row[i][0], offset);
      row[i][1] = Op::join(row[i][1], __shfl_xor_sync(0xffffffffu, row[i][1], offset));
    }
    if (lane == 0) op.finish(image, r, row[i]);
  }
}

// output = op.result(values, known of the row, of the column) of every place. Op: Element, kInputs,
// maps, inputs, output; Known row(image, r) and column(image, c).
template <class Op, int N>
__global__ void __launch_bounds__(kThreads, 3) write_table(const Op op) {
  using T = typename Op::Element;
  const Table table(op.maps);
  const int64_t image = blockIdx.x / table.blocks(), block = blockIdx.x % table.blocks();
  for (int64_t c = threadIdx.x % 32 * N; c < table.columns; c += 32 * N) {
    typename Op::Known of_columns[N];
#pragma unroll
    for (int e = 0; e < N; ++e) of_columns[e] = op.column(image, c + e);
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const int64_t r = block * kRows + i * kWarps + threadIdx.x / 32;
      if (r >= table.rows) break;
      const int64_t at = (image * table.rows + r) * table.columns + c;
      const auto of_row = op.row(image, r);
      ElementVector<T, N> loaded[Op::kInputs], result;
#pragma unroll
      for (int k = 0; k < Op::kInputs; ++k) loaded[k] = load_vector<N>(op.inputs[k] + at);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        float values[Op::kInputs];
#pragma unroll
        for (int k = 0; k < Op::kInputs; ++k) values[k] = to_float(loaded[k].values[e]);
        result.values[e] = from_float<T>(op.result(values, of_row, of_columns[e]));
      }
      store_vector(op.output + at, result);
    }
  }
}

// launch(kernel<Op, N>) a block for each kRows rows.
template <int N, class Op>
cudaError_t launch_rows(void (*kernel)(Op), const Op& op, int64_t floats, cudaStream_t stream) {
  const int64_t blocks = op.maps.batch * Table(op.maps).blocks();
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), floats * sizeof(float),
                stream, op);
}

// Whether rows are made of vectors of 16 bytes, wherever these begin.
template <class T>
bool wide(const Maps& maps, std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return Table(maps).columns % kWidestVector<T> == 0;
}

}  // namespace kernelpose::table
