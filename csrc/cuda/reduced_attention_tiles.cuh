// What the kernels of reduced_attention share: which block works on what, and where its rows lie.
//
// A unit is one (image, head). Rows (queries; in one pass keys) are cut into strips of 16, one a
// warp; a block is up to Tile<T>::kWarps warps. Columns pass through shared memory in tiles of
// Tile<T>::kRows, or stay there.
#pragma once

#include "kernelpose/attention.cuh"
#include "kernelpose/reduced_attention.h"

namespace kernelpose::cuda {

struct Problem {
  int64_t batch;
  int queries, keys, heads, head_dim, channels;
  float scale;
  bool aligned;  // of every tensor, see copy_rows
};

inline Problem make_problem(const ReducedAttentionShape& shape, bool aligned) {
  return {shape.batch,
          shape.queries,
          shape.keys,
          shape.heads,
          shape.head_dim,
          shape.channels(),
          static_cast<float>(shape.scale),
          aligned};
}

// How a launch cuts its work into blocks.
struct Grid {
  int64_t blocks;
  int warps;            // a block
  int splits;           // blocks that share a unit
  int tiles_per_block;  // tiles, of rows or of columns, that a block passes through
  int stages;           // of the ring of column tiles
};

// Blocks that give each of the 132 multiprocessors of an H100 two.
constexpr int kEnoughBlocks = 264;

// Warps a block of `units` units with so many strips: fewer than there may be where blocks are few.
template <class T>
int warps_of_block(int64_t units, int64_t strips) {
  int warps = strips < Tile<T>::kWarps ? static_cast<int>(strips) : Tile<T>::kWarps;
  while (warps > 1 && units * ceil_div(strips, warps) < kEnoughBlocks) --warps;
  return warps;
}

// A grid over the queries; the columns are keys and values. A block takes several row tiles where
// its columns stay in shared memory and there are blocks enough without.
template <class T>
Grid make_query_grid(const ReducedAttentionShape& shape, int64_t stage, int64_t fixed) {
  const int64_t units = shape.batch * shape.heads, strips = ceil_div(shape.queries, 16);
  const int64_t column_tiles = ceil_div(shape.keys, Tile<T>::kRows);
  const int warps = warps_of_block<T>(units, strips);
  const int stages = ring_stages(column_tiles, stage, fixed);
  const int64_t row_tiles = ceil_div(strips, warps);
  int64_t tiles_per_block = 1;
  if (column_tiles <= stages) {
    const int64_t spare = units * row_tiles / (2 * kEnoughBlocks);
    tiles_per_block = spare < 1 ? 1 : (spare < row_tiles ? spare : row_tiles);
  }
  const int64_t splits = ceil_div(row_tiles, tiles_per_block);
  return {units * splits, warps, static_cast<int>(splits), static_cast<int>(tiles_per_block),
          stages};
}

// One unit of the calling block.
struct Unit {
  int64_t image, number;  // number: image * heads + head
  int head, split;

  __device__ __forceinline__ Unit(const Problem& problem, const Grid& grid)
      : number(blockIdx.x / grid.splits),
        split(blockIdx.x - static_cast<int>(number) * grid.splits) {
    image = number / problem.heads;
    head = static_cast<int>(number - image * problem.heads);
  }

  // Query i of a tensor like q.
  template <class T>
  __device__ __forceinline__ T* query(const Problem& problem, T* tensor, int i) const {
    return tensor + (image * problem.queries + i) * problem.channels + head * problem.head_dim;
  }

  // Part 0, 1 (key, value) of key i of a tensor like kv.
  template <class T>
  __device__ __forceinline__ T* key(const Problem& problem, T* tensor, int part, int i) const {
    return tensor + ((image * problem.keys + i) * 2 + part) * problem.channels +
           head * problem.head_dim;
  }

  // Of lse and delta.
  __device__ __forceinline__ int64_t statistic(const Problem& problem, int i) const {
    return number * problem.queries + i;
  }
};

// Row i of two tensors like q.
template <class T>
__device__ __forceinline__ RowPair<T> query_pair(const Problem& problem, const Unit& unit,
                                                 const T* a, const T* b, int i) {
  if (i >= problem.queries) return {a, b, false};
  return {unit.query(problem, a, i), unit.query(problem, b, i), true};
}

// Key and value i.
template <class T>
__device__ __forceinline__ RowPair<T> key_pair(const Problem& problem, const Unit& unit,
                                               const T* kv, int i) {
  if (i >= problem.keys) return {kv, kv, false};
  return {unit.key(problem, kv, 0, i), unit.key(problem, kv, 1, i), true};
}

// Copies a tile of keys and values to a stage of the ring, all warps of the block together: the
// strips that hold columns of the chunks which will be read.
template <class T, int D, int kChunk>
__device__ __forceinline__ void copy_keys(const Problem& problem, const Unit& unit, const T* kv,
                                          int tile, T* stage, int warp, int warps, int lane) {
  constexpr int kRows = Tile<T>::kRows, kStride = kRowStride<T, D>;
  const int left = (problem.keys - tile * kRows + kChunk - 1) / kChunk * kChunk;
  for (int row = 16 * warp; row < min(kRows, left); row += 16 * warps) {
    copy_rows<T, D, true>(stage + row * kStride, stage + (kRows + row) * kStride,
                          key_pair(problem, unit, kv, tile * kRows + row + (lane & 15)), lane,
                          problem.head_dim, problem.aligned);
  }
}

}  // namespace kernelpose::cuda
