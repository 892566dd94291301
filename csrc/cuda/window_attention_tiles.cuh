// What the kernels of window_attention share: which block works on what, where its rows lie in
// global memory, and the scores of a chunk.
//
// A unit is one (image, head, cell). The rows of a unit are cut into tiles of Tile<T>::kRows; a unit
// of at most half a tile shares its block with the next (image, head) of the same cell: each has a
// slot of half the rows. Columns pass through shared memory in tiles of the same size and slots.
#pragma once

#include <cmath>

#include "kernelpose/launch.cuh"
#include "kernelpose/warp_tile.cuh"
#include "kernelpose/window_attention.h"

namespace kernelpose::cuda {

// One of several heads' matrices inside a tensor: element (image, token, head, c) lies at
// data[image * image_stride + token * token_stride + head * head_dim + c].
template <class T>
struct Matrix {
  T* data;
  int64_t image_stride, token_stride;
};

struct Unit {
  int64_t image;
  int head;
  bool exists;
};

template <class T>
__device__ __forceinline__ T* row_of(const Matrix<T>& matrix, const Unit& unit, int64_t token,
                                     int head_dim) {
  return matrix.data + unit.image * matrix.image_stride + token * matrix.token_stride +
         static_cast<int64_t>(unit.head) * head_dim;
}

// The tokens of a cell, row by row, as positions in the map.
struct Tokens {
  Cell rows, columns;
  int map_columns;
  uint32_t reciprocal;  // of columns.count; 0 stands for one column

  __device__ __forceinline__ Tokens(Cell rows, Cell columns, int map_columns)
      : rows(rows),
        columns(columns),
        map_columns(map_columns),
        reciprocal(columns.count == 1 ? 0 : 0xffffffffu / columns.count + 1) {}

  __device__ __forceinline__ int count() const { return rows.count * columns.count; }

  // Row of the cell that holds token i: exact while i * columns.count < 2^32.
  __device__ __forceinline__ int y(int i) const {
    return reciprocal == 0 ? i : static_cast<int>((uint64_t{reciprocal} * i) >> 32);
  }

  __device__ __forceinline__ int64_t at(int i) const {
    const int row = y(i), column = i - row * columns.count;
    return int64_t{1} * (rows.first + rows.step * row) * map_columns + columns.first +
           columns.step * column;
  }

  // Place of token i in units of the bias table: the difference of two, plus that of the table's
  // centre, is the table's row.
  __device__ __forceinline__ int bias_place(int i, int bias_columns) const {
    const int row = y(i);
    return row * bias_columns + i - row * columns.count;
  }
};

// How a launch cuts its work into blocks.
struct Grid {
  int64_t blocks;
  int packs;            // blocks that share the (image, head) pairs of a cell
  int splits;           // blocks that share the row tiles of a unit
  int tiles_per_block;  // row tiles of a block
  int stages;           // of the ring of column tiles
};

// The (image, head) pairs and the row tiles of one block.
template <class T>
struct Block {
  int64_t image;
  int head;
  const WindowAttentionShape& shape;
  int cell;
  int slots, slot_rows;      // slots * slot_rows = Tile<T>::kRows
  int first_tile, end_tile;  // row tiles; none if the block has nothing to do

  __device__ __forceinline__ Block(const WindowAttentionShape& shape, const Grid& grid)
      : shape(shape) {
    const int split = blockIdx.x % grid.splits;
    const int pack = blockIdx.x / grid.splits % grid.packs;
    cell = blockIdx.x / grid.splits / grid.packs;
    image = pack;
    first_tile = split * grid.tiles_per_block;
    end_tile = first_tile + grid.tiles_per_block;
  }

  // rows: of a unit of this block's cell.
  __device__ __forceinline__ void cut(int rows) {
    slots = rows <= Tile<T>::kRows / 2 ? 2 : 1;
    slot_rows = Tile<T>::kRows / slots;
    const int64_t first_unit = image * slots;
    image = first_unit / shape.heads;
    head = static_cast<int>(first_unit - image * shape.heads);
    const int tiles = image < shape.batch ? (rows + slot_rows - 1) / slot_rows : 0;
    end_tile = end_tile < tiles ? end_tile : tiles;
  }

  __device__ __forceinline__ Unit unit(int slot) const {
    const bool wraps = head + slot >= shape.heads;  // slot is 0 or 1
    const Unit unit = {image + wraps, head + slot - (wraps ? shape.heads : 0), true};
    return {unit.image, unit.head, unit.image < shape.batch};
  }
};

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

inline int largest_cell(const WindowAttentionShape& shape) {  // tokens, an upper bound
  const auto edge = [](const Axis& axis) {
    return axis.extent() < axis.size ? axis.extent() : axis.size;
  };
  return edge(shape.rows) * edge(shape.columns);
}

// cells x units of at most `rows` rows each. A block takes several row tiles of a unit when its
// columns stay in shared memory for all of them and there are blocks enough without.
template <class T>
Grid make_grid(const WindowAttentionShape& shape, int cells, int rows, bool resident, int stages) {
  constexpr int kEnoughBlocks = 512;  // fills the largest GPUs of today once
  const int slots = rows <= Tile<T>::kRows / 2 ? 2 : 1;
  const int tiles = ceil_div(rows, Tile<T>::kRows / slots);
  const int64_t units = shape.batch * shape.heads;
  Grid grid;
  grid.stages = stages;
  grid.packs = ceil_div(units, slots);
  grid.tiles_per_block = 1;
  if (resident) {
    const int64_t spare = int64_t{1} * cells * grid.packs * tiles / kEnoughBlocks;
    grid.tiles_per_block = static_cast<int>(spare < 1 ? 1 : (spare < tiles ? spare : tiles));
  }
  grid.splits = ceil_div(tiles, grid.tiles_per_block);
  grid.blocks = int64_t{1} * cells * grid.packs * grid.splits;
  return grid;
}

// Stages of a ring for `tiles` column tiles of `stage` bytes beside `fixed` bytes: all tiles if they
// leave room for two blocks a multiprocessor, else two, or one on the smallest shared memories.
inline int ring_stages(int tiles, int64_t stage, int64_t fixed) {
  constexpr int64_t kComfortable = 80 * 1024, kLimit = 99 * 1024;
  int stages = tiles < kMaxStages ? tiles : kMaxStages;
  while (stages > 2 && fixed + stages * stage > kComfortable) --stages;
  while (stages > 1 && fixed + stages * stage > kLimit) --stages;
  return stages;
}

inline dim3 grid_dim(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }
constexpr int64_t kMaxBlocks = 0x7fffffff;

// The relative-position table as one head sees it: in shared memory where it fits, else in place.
constexpr int kSharedBias = 2048;  // entries

inline int shared_bias(const WindowAttentionShape& shape, const float* bias) {
  const int64_t entries = int64_t{1} * shape.bias_rows() * shape.bias_columns();
  return bias != nullptr && entries <= kSharedBias ? static_cast<int>(entries) : 0;
}

struct Bias {
  const float* table;  // nullptr: none
  int stride;          // from one row of the table to the next
};

// Copies the heads' columns to `shared` (slots x entries) and returns the one of `slot`; a barrier
// has to follow before it is read.
template <class T>
__device__ __forceinline__ Bias load_bias(const float* table, int entries, float* shared,
                                          const Block<T>& block, int slot) {
  if (table == nullptr) return {nullptr, 0};
  const int heads = block.shape.heads;
  if (entries == 0) return {table + block.unit(slot).head, heads};
  for (int s = 0; s < block.slots; ++s) {
    const int head = block.unit(s).head;
    for (int i = threadIdx.x; i < entries; i += Tile<T>::kThreads) {
      shared[s * entries + i] = __ldg(table + int64_t{1} * i * heads + head);
    }
  }
  return {shared + slot * entries, 1};
}

// Turns products q k of a chunk into scores in units of log 2: scaled, with the bias, and -inf in
// columns that do not exist. Rows are queries, or keys if kKeyRows.
template <bool kKeyRows, int N>
__device__ __forceinline__ void to_scores(float (&s)[N / 8][4], float scale, const Bias& bias,
                                          int centre, const int (&row_place)[2],
                                          const int* column_places, int biased, int count,
                                          int lane) {
  const float scale2 = scale * kLog2E;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] *= scale2;
  }
  if (bias.table != nullptr) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const int column = 8 * j + 2 * (lane & 3);
      const int2 places = *reinterpret_cast<const int2*>(column_places + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column + (i & 1) < biased) {
          const int difference = row_place[i >> 1] - ((i & 1) ? places.y : places.x);
          const int64_t row = centre + (kKeyRows ? -difference : difference);
          s[j][i] = fmaf(bias.table[row * bias.stride], kLog2E, s[j][i]);
        }
      }
    }
  }
  if (count < N) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (8 * j + 2 * (lane & 3) + (i & 1) >= count) s[j][i] = -INFINITY;
      }
    }
  }
}

}  // namespace kernelpose::cuda
