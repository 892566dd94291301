// One cell of the map as dense matrices: gathering its rows, its bias, its softmax.
#pragma once

#include "kernelpose/window_attention.h"
#include "matmul.h"
#include "simd.h"

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

// Tokens of one head in one image of a packed qkv map, or of one of its parts.
template <class Element>
struct HeadView {
  Element* data;
  int64_t stride;  // elements from token to token

  Element* row(int64_t token) const { return data + token * stride; }
};

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

// Scratch memory is handed out in pieces that start on a cache line.
template <class T>
class Arena {
 public:
  explicit Arena(T* memory) : memory_(memory) {}
  T* take(int64_t elements) {
    T* piece = memory_ + used_;
    used_ += piece_size(elements);
    return memory_ ? piece : nullptr;
  }
  int64_t used() const { return used_; }
  static int64_t piece_size(int64_t elements) { return round_up(elements, 64 / sizeof(T)); }

 private:
  T* memory_;
  int64_t used_ = 0;
};

// Sizes of one cell's matrices. Widths are padded so that every row is whole vectors.
template <class T>
struct CellSizes {
  int tokens;        // queries, the tokens of the cell
  int own_keys;      // keys among them: all or none
  int keys;          // own and pooled keys
  int64_t keys_pad;  // a multiple of the vector width
  int head_dim;
  int64_t dim_pad;

  CellSizes(const WindowAttentionShape& shape, int cell_tokens, int cell_own_keys)
      : tokens(cell_tokens),
        own_keys(cell_own_keys),
        keys(cell_own_keys + shape.pools()),
        keys_pad(round_up(keys, kWidth<T>)),
        head_dim(shape.head_dim),
        dim_pad(round_up(shape.head_dim, kWidth<T>)) {}
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

// One token's row, times `factor`, with its padding.
template <class Element>
void gather_row(const Element* from, Compute<Element> factor,
                const CellSizes<Compute<Element>>& sizes, Compute<Element>* row) {
  read_row(from, sizes.head_dim, factor, row);
  for (int64_t c = sizes.head_dim; c < sizes.dim_pad; ++c) row[c] = 0;
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

// (keys, dim_pad) -> panels of keys: key j, channel c at panel(j)[c * kPanel + j % kPanel].
template <class T>
void transpose_to_panels(const T* rows, const CellSizes<T>& sizes, T* panels) {
  constexpr int n = kWidth<T>;
  for (int64_t key = 0; key < sizes.keys_pad; key += n) {
    T* panel = panels + key / kPanel<T> * kPanel<T> * sizes.dim_pad + key % kPanel<T>;
    for (int64_t c = 0; c < sizes.dim_pad; c += n) {
      Vector<T> square[n];
      for (int i = 0; i < n; ++i) {
        square[i] = key + i < sizes.keys ? load(rows + (key + i) * sizes.dim_pad + c) : Vector<T>{};
      }
      transpose_square<T>(square);
      for (int i = 0; i < n; ++i) store(panel + (c + i) * kPanel<T>, square[i]);
    }
  }
}

template <class T>
int64_t panels_size(const CellSizes<T>& sizes) {
  return round_up(sizes.keys_pad, kPanel<T>) * sizes.dim_pad;
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

// 2^(score - largest), in place, for kRows rows of scores in base 2; returns the largest and the
// sum of each. Rows go together because each alone is a chain of dependent steps.
template <class T, int kRows>
void softmax_rows(T* rows, const CellSizes<T>& sizes, T* largest, T* sums) {
  for (int r = 0; r < kRows; ++r) {
    T* row = rows + r * sizes.keys_pad;
    for (int64_t j = sizes.keys; j < sizes.keys_pad; ++j) row[j] = -__builtin_inf();
  }
  Vector<T> most[kRows], total[kRows];
  for (int r = 0; r < kRows; ++r) most[r] = load(rows + r * sizes.keys_pad);
  for (int64_t j = kWidth<T>; j < sizes.keys_pad; j += kWidth<T>) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      most[r] = maximum(most[r], load(rows + r * sizes.keys_pad + j));
    }
  }
  for (int r = 0; r < kRows; ++r) {
    largest[r] = reduce_maximum<T>(most[r]);
    most[r] = broadcast(largest[r]);
    total[r] = Vector<T>{};
  }
  for (int64_t j = 0; j < sizes.keys_pad; j += kWidth<T>) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      T* at = rows + r * sizes.keys_pad + j;
      const Vector<T> e = power_of_two(load(at) - most[r]);
      store(at, e);
      total[r] += e;
    }
  }
  for (int r = 0; r < kRows; ++r) sums[r] = reduce_sum<T>(total[r]);
}

template <class T>
void softmax_block(T* scores, int queries, const CellSizes<T>& sizes, T* largest, T* sums) {
  int i = 0;
  for (; i + 4 <= queries; i += 4) {
    softmax_rows<T, 4>(scores + i * sizes.keys_pad, sizes, largest + i, sums + i);
  }
  for (; i < queries; ++i) {
    softmax_rows<T, 1>(scores + i * sizes.keys_pad, sizes, largest + i, sums + i);
  }
}

}  // namespace kernelpose::cpu::KP_ISA
