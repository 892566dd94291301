// Means of keys and values over the rolled windows, the keys that `pooled` adds to every cell.
#pragma once

#include "window_attention_tiles.cuh"

namespace kernelpose::cuda {

// The tokens of an axis that enter a pool: those of one cell, and for the last pool of a shifted
// axis those of cell 0 as well, which the roll brings there.
struct PoolTokens {
  Cell cell, rolled;

  __device__ __forceinline__ PoolTokens(const Axis& axis, int pool)
      : cell{0, 1, 0}, rolled{0, 1, 0} {
    const bool shifted = !axis.grid && axis.shift != 0;
    const int index = shifted ? pool + 1 : pool;
    if (index < axis.cells()) cell = axis.cell(index);
    if (shifted && axis.pool(0) == pool) rolled = axis.cell(0);
  }

  __device__ __forceinline__ int count() const { return cell.count + rolled.count; }

  __device__ __forceinline__ int at(int i) const {
    return i < cell.count ? cell.first + cell.step * i
                          : rolled.first + rolled.step * (i - cell.count);
  }
};

__device__ __forceinline__ int pool_tokens(const WindowAttentionShape& shape, int pool) {
  return PoolTokens(shape.rows, pool / shape.columns.pools()).count() *
         PoolTokens(shape.columns, pool % shape.columns.pools()).count();
}

// The pool that the tokens of a cell enter.
__device__ __forceinline__ int pool_of(const Problem& problem, int cell) {
  const Axis &rows = problem.shape.rows, &columns = problem.shape.columns;
  const int y = cell / problem.cell_columns, x = cell - y * problem.cell_columns;
  return rows.pool(y) * columns.pools() + columns.pool(x);
}

// A thread averages kVector neighbouring channels of one pool; neighbours in a warp read
// neighbouring channels. Bytes: k and v read once, means (image, pool, 2C) written.
// budget: pool_means<*> registers<=48
template <class T, int kVector>
__global__ void __launch_bounds__(256)
    pool_means(const T* __restrict__ qkv, T* __restrict__ means, WindowAttentionShape shape) {
  const int channels = shape.channels();
  const int vectors = 2 * channels / kVector;
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t entry = index / vectors;  // image * pools + pool
  if (entry >= shape.batch * shape.pools()) return;
  const int channel = static_cast<int>(index - entry * vectors) * kVector;
  const int64_t image = entry / shape.pools();
  const int pool = static_cast<int>(entry - image * shape.pools());
  const PoolTokens rows(shape.rows, pool / shape.columns.pools());
  const PoolTokens columns(shape.columns, pool % shape.columns.pools());
  const int row_count = rows.count(), column_count = columns.count();

  float sum[kVector] = {};
  const T* source = qkv + image * shape.tokens() * 3 * channels + channels + channel;
  for (int y = 0; y < row_count; ++y) {
    const int64_t line = int64_t{1} * rows.at(y) * shape.columns.size;
#pragma unroll 4
    for (int x = 0; x < column_count; ++x) {
      const T* token = source + (line + columns.at(x)) * 3 * channels;
      alignas(16) T values[kVector];
      if constexpr (kVector * sizeof(T) == 16) {
        *reinterpret_cast<uint4*>(values) = __ldg(reinterpret_cast<const uint4*>(token));
      } else {
        values[0] = token[0];
      }
#pragma unroll
      for (int e = 0; e < kVector; ++e) sum[e] += to_float(values[e]);
    }
  }
  const float weight = 1.f / (row_count * column_count);
  T* target = means + entry * 2 * channels + channel;
#pragma unroll
  for (int e = 0; e < kVector; ++e) target[e] = from_float<T>(sum[e] * weight);
}

inline int64_t pool_means_elements(const WindowAttentionShape& shape) {
  return shape.batch * shape.pools() * 2 * shape.channels();
}

template <class T>
cudaError_t launch_pool_means(const T* qkv, T* means, const WindowAttentionShape& shape,
                              bool aligned, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t threads = pool_means_elements(shape);
  if (!aligned) {
    return launch_blocks(pool_means<T, 1>, ceil_div(threads, 256), 256, 0, stream, qkv, means,
                         shape);
  }
  return launch_blocks(pool_means<T, kVector>, ceil_div(threads / kVector, 256), 256, 0, stream,
                       qkv, means, shape);
}

}  // namespace kernelpose::cuda
