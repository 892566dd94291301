// What the kernels of window_attention share: which block works on what, where its rows lie in
// global memory, and the scores of a chunk.
//
// A unit is one (image, head, cell). The rows of a unit are cut into tiles of Tile<T>::kRows; a
// unit of at most half a tile shares its block with the next (image, head) of the same cell: each
// has a slot of half the rows. Columns pass through shared memory in tiles of the same size and
// slots. Each warp works on, and copies, rows 16 w .. 16 w + 15 of every tile: rows of one slot.
#pragma once

#include "kernelpose/attention.cuh"
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

  __device__ __forceinline__ int at(int i) const {
    const int row = y(i), column = i - row * columns.count;
    return (rows.first + rows.step * row) * map_columns + columns.first + columns.step * column;
  }

  // Place of token i in units of the bias table: the difference of two, plus that of the table's
  // centre, is the table's row.
  __device__ __forceinline__ int bias_place(int i, int bias_columns) const {
    const int row = y(i);
    return row * bias_columns + i - row * columns.count;
  }
};

// What all kernels are told. The numbers that take divisions come from the host.
struct Problem {
  WindowAttentionShape shape;
  int tokens, pools, cell_columns, bias_columns;
  int bias_centre;  // row of the table for a token and itself
  float scale;
  bool aligned;  // of every matrix, see copy_rows
};

inline Problem make_problem(const WindowAttentionShape& shape, bool aligned) {
  return {shape,
          static_cast<int>(shape.tokens()),
          shape.pools(),
          shape.columns.cells(),
          shape.bias_columns(),
          shape.bias_row(0, 0, 0, 0),
          static_cast<float>(shape.scale),
          aligned};
}

__device__ __forceinline__ Tokens tokens_of(const Problem& problem, int cell) {
  const int y = cell / problem.cell_columns, x = cell - y * problem.cell_columns;
  return Tokens(problem.shape.rows.cell(y), problem.shape.columns.cell(x),
                problem.shape.columns.size);
}

template <class T>
__device__ __forceinline__ T* row_of(const Problem& problem, const Matrix<T>& matrix,
                                     const Unit& unit, int token) {
  return matrix.data + unit.image * matrix.image_stride + token * matrix.token_stride +
         unit.head * problem.shape.head_dim;
}

// Of a unit's lse and delta, (image, head, token) in memory.
__device__ __forceinline__ int64_t statistic_of(const Problem& problem, const Unit& unit,
                                                int token) {
  return (unit.image * problem.shape.heads + unit.head) * problem.tokens + token;
}

// The keys of a cell: its tokens, then the pooled ones.
template <class T>
struct Keys {
  Matrix<const T> key, value, pooled_key, pooled_value;
};

// Key and value i of a cell of `count` tokens.
template <class T>
__device__ __forceinline__ RowPair<T> key_row(const Problem& problem, const Keys<T>& keys,
                                              const Unit& unit, const Tokens& tokens, int count,
                                              int i) {
  if (!unit.exists || i >= count + problem.pools) return {keys.key.data, keys.value.data, false};
  if (i < count) {
    const int token = tokens.at(i);
    return {row_of(problem, keys.key, unit, token), row_of(problem, keys.value, unit, token), true};
  }
  return {row_of(problem, keys.pooled_key, unit, i - count),
          row_of(problem, keys.pooled_value, unit, i - count), true};
}

// Row i of two matrices over the tokens of a cell.
template <class T>
__device__ __forceinline__ RowPair<T> token_row(const Problem& problem, const Matrix<const T>& a,
                                                const Matrix<const T>& b, const Unit& unit,
                                                const Tokens& tokens, int count, int i) {
  if (!unit.exists || i >= count) return {a.data, b.data, false};
  const int token = tokens.at(i);
  return {row_of(problem, a, unit, token), row_of(problem, b, unit, token), true};
}

// Where row i of the result goes, nullptr where there is none.
template <class T>
__device__ __forceinline__ T* target_row(const Problem& problem, const Matrix<T>& matrix,
                                         const Unit& unit, const Tokens& tokens, int count, int i) {
  return i < count ? row_of(problem, matrix, unit, tokens.at(i)) : nullptr;
}

// How a launch cuts its work into blocks.
struct Grid {
  int64_t blocks;
  int packs;            // blocks that share the (image, head) pairs of a cell
  int splits;           // blocks that share the row tiles of a unit
  int tiles_per_block;  // row tiles of a block
  int stages;           // of the ring of column tiles
};

// Which cell and row tiles a block works on, and which unit and rows of a tile the calling warp.
template <class T>
struct Work {
  int cell, pack;
  int first_tile, end_tile;  // row tiles; none if the block has nothing to do
  int slots, slot_rows;      // slots * slot_rows = Tile<T>::kRows
  int lane, tile_row;        // tile_row: the warp's first row in a tile of the block
  int warp_row;              // and in its slot
  Unit unit;

  __device__ __forceinline__ explicit Work(const Grid& grid) {
    const int unsplit = blockIdx.x / grid.splits;
    first_tile = (blockIdx.x - unsplit * grid.splits) * grid.tiles_per_block;
    cell = unsplit / grid.packs;
    pack = unsplit - cell * grid.packs;
  }

  // rows: of a unit of this block's cell.
  __device__ __forceinline__ void cut(const Problem& problem, const Grid& grid, int rows) {
    slots = rows <= Tile<T>::kRows / 2 ? 2 : 1;
    slot_rows = Tile<T>::kRows / slots;
    const int tiles = (rows + slot_rows - 1) / slot_rows;
    end_tile = min(first_tile + grid.tiles_per_block, tiles);
    if (unit_of_slot(problem, 0).image >= problem.shape.batch) end_tile = 0;
    lane = threadIdx.x & 31;
    tile_row = threadIdx.x >> 5 << 4;
    warp_row = tile_row & (slot_rows - 1);
    unit = unit_of_slot(problem, tile_row / slot_rows);
  }

  __device__ __forceinline__ Unit unit_of_slot(const Problem& problem, int slot) const {
    const unsigned number = static_cast<unsigned>(pack) * slots + slot;
    const int image = number / problem.shape.heads;
    return {image, static_cast<int>(number - image * problem.shape.heads),
            image < problem.shape.batch};
  }
};

inline int largest_cell(const WindowAttentionShape& shape) {  // tokens, an upper bound
  const auto edge = [](const Axis& axis) {
    return axis.extent() < axis.size ? axis.extent() : axis.size;
  };
  return edge(shape.rows) * edge(shape.columns);
}

template <class T>
int rows_of_slot(int rows) {
  return rows <= Tile<T>::kRows / 2 ? Tile<T>::kRows / 2 : Tile<T>::kRows;
}

// `cells` cells of at most `rows` rows and `columns` columns. A block takes several row tiles of a
// unit when its columns stay in shared memory for all of them and there are blocks enough without.
template <class T>
Grid make_grid(const WindowAttentionShape& shape, int cells, int rows, int columns, int64_t stage,
               int64_t fixed) {
  constexpr int kEnoughBlocks = 512;  // fills the largest GPUs of today once
  const int64_t row_tiles = ceil_div(rows, rows_of_slot<T>(rows));
  const int64_t column_tiles = ceil_div(columns, rows_of_slot<T>(rows));
  const int64_t packs = ceil_div(shape.batch * shape.heads, Tile<T>::kRows / rows_of_slot<T>(rows));
  const int stages = ring_stages(column_tiles, stage, fixed);
  int64_t tiles_per_block = 1;
  if (column_tiles <= stages) {
    const int64_t spare = cells * packs * row_tiles / kEnoughBlocks;
    tiles_per_block = spare < 1 ? 1 : (spare < row_tiles ? spare : row_tiles);
  }
  const int64_t splits = ceil_div(row_tiles, tiles_per_block);
  return {cells * packs * splits, static_cast<int>(packs), static_cast<int>(splits),
          static_cast<int>(tiles_per_block), stages};
}

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

// Copies the heads' columns to `shared` (slots x entries) and returns the calling warp's; a barrier
// has to follow before it is read.
template <class T>
__device__ __forceinline__ Bias load_bias(const float* table, int entries, float* shared,
                                          const Problem& problem, const Work<T>& work) {
  if (table == nullptr) return {nullptr, 0};
  const int heads = problem.shape.heads;
  if (entries == 0) return {table + work.unit.head, heads};
  for (int slot = 0; slot < work.slots; ++slot) {
    const int head = work.unit_of_slot(problem, slot).head;
    for (int i = threadIdx.x; i < entries; i += Tile<T>::kThreads) {
      shared[slot * entries + i] = __ldg(table + i * heads + head);
    }
  }
  return {shared + work.tile_row / work.slot_rows * entries, 1};
}

// Places of the two rows of a lane in the bias table, row and row + 8, of a cell of `count` tokens.
__device__ __forceinline__ void row_places(int (&place)[2], const Bias& bias, const Tokens& tokens,
                                           int row, int count, int bias_columns) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    place[half] =
        bias.table == nullptr ? 0 : tokens.bias_place(min(row + 8 * half, count - 1), bias_columns);
  }
}

// Turns products q k of a chunk into scores in units of log 2: scaled, with the bias in the first
// `biased` columns, and -inf from column `count` on. Rows are queries, or keys if kKeyRows.
template <bool kKeyRows, int N>
__device__ __forceinline__ void to_scores(float (&s)[N / 8][4], float scale, const Bias& bias,
                                          int centre, const int (&row_place)[2],
                                          const int* column_places, int biased, int count,
                                          int lane) {
  scale_scores<N>(s, scale * kLog2E);
  if (bias.table != nullptr) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const int column = 8 * j + 2 * (lane & 3);
      const int2 places = *reinterpret_cast<const int2*>(column_places + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column + (i & 1) < biased) {
          const int difference = row_place[i >> 1] - ((i & 1) ? places.y : places.x);
          const int row = centre + (kKeyRows ? -difference : difference);
          s[j][i] = fmaf(bias.table[row * bias.stride], kLog2E, s[j][i]);
        }
      }
    }
  }
  hide_columns<N>(s, count, lane);
}

}  // namespace kernelpose::cuda
