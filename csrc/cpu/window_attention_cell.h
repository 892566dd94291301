// One cell of the map as dense matrices: gathering its rows, its bias, its scores.
#pragma once

#include "attention.h"
#include "kernelpose/window_attention.h"

namespace kernelpose::cpu::KP_ISA {

// A rectangle of the map, strided or not, and the tokens in it.
struct CellTokens {
  Cell rows, columns;
  int64_t width;  // of the map

  int count() const { return rows.count * columns.count; }
  int64_t token(int y, int x) const {
    return (rows.first + int64_t{y} * rows.step) * width + columns.first +
           int64_t{x} * columns.step;
  }
  // Tokens first .. first + count - 1 of the cell.
  void list(int first, int count, int64_t* tokens) const {
    int y = first / columns.count, x = first % columns.count;
    for (int i = 0; i < count; ++i) {
      tokens[i] = token(y, x);
      if (++x == columns.count) {
        x = 0;
        ++y;
      }
    }
  }
  template <class Visit>
  void each(Visit visit) const {
    int index = 0;
    for (int y = 0; y < rows.count; ++y) {
      for (int x = 0; x < columns.count; ++x) visit(index++, token(y, x));
    }
  }
};

inline CellTokens cell_tokens(const WindowAttentionShape& shape, int cell) {
  const int columns = shape.columns.cells();
  return {shape.rows.cell(cell / columns), shape.columns.cell(cell % columns), shape.columns.size};
}

inline CellTokens whole_map(const WindowAttentionShape& shape) {
  return {{0, 1, shape.rows.size}, {0, 1, shape.columns.size}, shape.columns.size};
}

// Index of the window whose mean the tokens of a cell enter.
inline int cell_pool(const WindowAttentionShape& shape, int cell) {
  const int columns = shape.columns.cells();
  return shape.rows.pool(cell / columns) * shape.columns.pools() +
         shape.columns.pool(cell % columns);
}

template <class Element>
HeadView<Element> qkv_view(Element* qkv, const WindowAttentionShape& shape, int64_t image, int head,
                           int part) {
  const int64_t channels = shape.channels();
  return {qkv + image * shape.tokens() * 3 * channels + part * channels +
              int64_t{head} * shape.head_dim,
          3 * channels};
}

template <class Element>
HeadView<Element> map_view(Element* map, const WindowAttentionShape& shape, int64_t image,
                           int head) {
  const int64_t channels = shape.channels();
  return {map + image * shape.tokens() * channels + int64_t{head} * shape.head_dim, channels};
}

template <class T>
struct CellSizes : AttentionSizes<T> {
  int tokens;    // queries, the tokens of the cell
  int own_keys;  // keys among them: all or none; the others are the pooled ones

  CellSizes(const WindowAttentionShape& shape, int cell_tokens, int cell_own_keys)
      : AttentionSizes<T>(cell_own_keys + shape.pools(), shape.head_dim),
        tokens(cell_tokens),
        own_keys(cell_own_keys) {}
};

inline int largest_cell(const WindowAttentionShape& shape) {
  auto longest = [](const Axis& axis) {
    int most = 0;
    for (int i = 0; i < axis.cells(); ++i) {
      most = axis.cell(i).count > most ? axis.cell(i).count : most;
    }
    return most;
  };
  return longest(shape.rows) * longest(shape.columns);
}

// The keys (or values) of a cell: its own if they count, then the pooled ones; (keys, dim_pad).
template <class Element>
void gather_keys(const HeadView<const Element>& view, const CellTokens& cell,
                 const Compute<Element>* pooled, const CellSizes<Compute<Element>>& sizes,
                 Compute<Element>* rows) {
  using T = Compute<Element>;
  if (sizes.own_keys) {
    cell.each([&](int i, int64_t token) {
      gather_row(view.row(token), T(1), sizes, rows + i * sizes.dim_pad);
    });
  }
  for (int j = sizes.own_keys; j < sizes.keys; ++j) {
    gather_row(pooled + int64_t{j - sizes.own_keys} * sizes.head_dim, T(1), sizes,
               rows + j * sizes.dim_pad);
  }
}

// The bias table of one head, times log2(e), backwards: the keys of a row of the cell, left to
// right, then read it left to right.
template <class T>
void reverse_table(const T* bias, const WindowAttentionShape& shape, int head, T* reversed) {
  const int entries = shape.bias_rows() * shape.bias_columns();
  for (int i = 0; i < entries; ++i) {
    reversed[i] = T(kLog2E) * bias[static_cast<int64_t>(entries - 1 - i) * shape.heads + head];
  }
}

// Start, in a reversed table, of the run that key row `key_y` of the cell reads for a query.
inline int64_t reversed_run(const WindowAttentionShape& shape, int query_y, int query_x,
                            int key_y) {
  return int64_t{key_y - query_y + shape.rows.extent() - 1} * shape.bias_columns() +
         shape.columns.extent() - 1 - query_x;
}

// Calls visit(piece of the score row, start in the reversed table, length) for each row of keys.
template <class T, class Visit>
void each_bias_run(const WindowAttentionShape& shape, const CellTokens& cell, int query, T* row,
                   Visit visit) {
  const int query_y = query / cell.columns.count, query_x = query % cell.columns.count;
  for (int key_y = 0; key_y < cell.rows.count; ++key_y) {
    visit(row + key_y * cell.columns.count, reversed_run(shape, query_y, query_x, key_y),
          cell.columns.count);
  }
}

// scores (queries, keys_pad) of a block: scaled queries times keys, plus the bias. Like the
// queries' scale and the table, they carry the factor log2(e), which makes powers of two of the
// softmax.
template <class T>
void block_scores(const WindowAttentionShape& shape, const CellTokens& cell,
                  const CellSizes<T>& sizes, int first_query, int queries, const T* scaled_queries,
                  const T* key_panels, const T* reversed, T* scores) {
  matmul<T, false>(queries, sizes.keys_pad, sizes.dim_pad, {scaled_queries, sizes.dim_pad, 1},
                   key_panels, kPanel<T>, kPanel<T> * sizes.dim_pad, scores, sizes.keys_pad);
  if (!reversed) return;
  for (int i = 0; i < queries; ++i) {
    each_bias_run(shape, cell, first_query + i, scores + i * sizes.keys_pad,
                  [&](T* run, int64_t start, int count) {
                    for (int x = 0; x < count; ++x) run[x] += reversed[start + x];
                  });
  }
}

}  // namespace kernelpose::cpu::KP_ISA
