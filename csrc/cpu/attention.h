// Attention of one head as dense matrices, what the attention kernels share: sizes and scratch
// memory, rows and panels of keys, the softmax of a block of queries and its gradient.
#pragma once

#include "matmul.h"
#include "simd.h"

namespace kernelpose::cpu::KP_ISA {

// Tokens of one head in one image of a tensor.
template <class Element>
struct HeadView {
  Element* data;
  int64_t stride;  // elements from token to token

  Element* row(int64_t token) const { return data + token * stride; }
};

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

// Widths are padded so that every row is whole vectors.
template <class T>
struct AttentionSizes {
  int keys;
  int64_t keys_pad;
  int head_dim;
  int64_t dim_pad;

  AttentionSizes(int keys, int head_dim)
      : keys(keys),
        keys_pad(round_up(keys, kWidth<T>)),
        head_dim(head_dim),
        dim_pad(round_up(head_dim, kWidth<T>)) {}
};

// One token's row, times `factor`, with its padding.
template <class Element>
void gather_row(const Element* from, Compute<Element> factor,
                const AttentionSizes<Compute<Element>>& sizes, Compute<Element>* row) {
  using T = Compute<Element>;
  int c = 0;
  if constexpr (std::is_same_v<Element, BFloat16>) {
    for (; c + kWidth<T> <= sizes.head_dim; c += kWidth<T>) {
      store(row + c, load_elements(from + c) * factor);
    }
  }
  read_row(from + c, sizes.head_dim - c, factor, row + c);
  for (int64_t i = sizes.head_dim; i < sizes.dim_pad; ++i) row[i] = 0;
}

// The inverse: one token's row, times `factor`, without its padding.
template <class Element>
void scatter_row(const Compute<Element>* row, Compute<Element> factor,
                 const AttentionSizes<Compute<Element>>& sizes, Element* to) {
  using T = Compute<Element>;
  int c = 0;
  if constexpr (std::is_same_v<Element, BFloat16>) {
    for (; c + kWidth<T> <= sizes.head_dim; c += kWidth<T>) {
      store_elements(to + c, load(row + c) * factor);
    }
  }
  write_row(row + c, sizes.head_dim - c, factor, to + c);
}

// (keys, dim_pad) -> panels of keys: key j, channel c at panel(j)[c * kPanel + j % kPanel].
template <class T>
void transpose_to_panels(const T* rows, const AttentionSizes<T>& sizes, T* panels) {
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
int64_t panels_size(const AttentionSizes<T>& sizes) {
  return round_up(sizes.keys_pad, kPanel<T>) * sizes.dim_pad;
}

// 2^(score - largest), in place, for kRows rows of scores in base 2; returns the largest and the
// sum of each. Rows go together because each alone is a chain of dependent steps.
template <class T, int kRows>
void softmax_rows(T* rows, const AttentionSizes<T>& sizes, T* largest, T* sums) {
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
void softmax_block(T* scores, int queries, const AttentionSizes<T>& sizes, T* largest, T* sums) {
  int i = 0;
  for (; i + 4 <= queries; i += 4) {
    softmax_rows<T, 4>(scores + i * sizes.keys_pad, sizes, largest + i, sums + i);
  }
  for (; i < queries; ++i) {
    softmax_rows<T, 1>(scores + i * sizes.keys_pad, sizes, largest + i, sums + i);
  }
}

// Weights of kRows queries on up to one panel of keys, which has kVectors vectors: scores, softmax
// and its division in registers. `absent` is -inf where the last vector has no key, else 0.
template <class T, int kRows, int kVectors>
inline void weights_tile(int64_t channels, Strided<const T> q, const T* panel, Vector<T> absent,
                         T* weights, T* largest, T* sums) {
  Vector<T> score[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) score[i][j] = j + 1 < kVectors ? Vector<T>{} : absent;
  }
  for (int64_t c = 0; c < channels; ++c) {
    Vector<T> keys[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) keys[j] = load(panel + c * kPanel<T> + j * kWidth<T>);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const T x = q.data[i * q.row + c * q.column];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) score[i][j] += x * keys[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    Vector<T> most = score[i][0];
#pragma GCC unroll 4
    for (int j = 1; j < kVectors; ++j) most = maximum(most, score[i][j]);
    largest[i] = reduce_maximum<T>(most);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    Vector<T> total = {};
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      score[i][j] = power_of_two(score[i][j] - largest[i]);
      total += score[i][j];
    }
    sums[i] = reduce_sum<T>(total);
    const T factor = T(1) / sums[i];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      store(weights + (i * kVectors + j) * kWidth<T>, score[i][j] * factor);
    }
  }
}

template <class T, int kVectors>
void weights_panel(int queries, const AttentionSizes<T>& sizes, Strided<const T> q, const T* panel,
                   T* weights, T* largest, T* sums) {
  constexpr int kRows = tile_rows(kVectors);
  Vector<T> absent = {};
  for (int64_t j = sizes.keys; j < sizes.keys_pad; ++j) {
    absent[j % kWidth<T>] = -__builtin_inf();
  }
  const auto tiles = [&](auto rows) {
    for (; queries >= rows; queries -= rows) {
      weights_tile<T, rows, kVectors>(sizes.head_dim, q, panel, absent, weights, largest, sums);
      q.data += rows * q.row;
      weights += rows * sizes.keys_pad;
      largest += rows;
      sums += rows;
    }
  };
  tiles(std::integral_constant<int, kRows>{});
  tiles(std::integral_constant<int, 4>{});
  tiles(std::integral_constant<int, 1>{});
}

// weights (queries, keys_pad): softmax of the products of q and the scaled keys, whose largest and
// sum of powers of two come back as well.
template <class T>
void softmax_weights(int queries, const AttentionSizes<T>& sizes, Strided<const T> q,
                     const T* key_panels, T* weights, T* largest, T* sums) {
  if constexpr (std::is_same_v<T, float>) {  // a double's exponential is a call
    const auto panel = [&](auto vectors) {
      weights_panel<T, vectors>(queries, sizes, q, key_panels, weights, largest, sums);
    };
    switch (sizes.keys_pad / kWidth<T>) {
      case 1:
        return panel(std::integral_constant<int, 1>{});
      case 2:
        return panel(std::integral_constant<int, 2>{});
      case 3:
        if constexpr (kPanelVectors > 2) return panel(std::integral_constant<int, 3>{});
        break;
      case 4:
        if constexpr (kPanelVectors > 2) return panel(std::integral_constant<int, 4>{});
        break;
    }
  }
  matmul<T, false>(queries, sizes.keys_pad, sizes.head_dim, q, key_panels, kPanel<T>,
                   kPanel<T> * sizes.dim_pad, weights, sizes.keys_pad);
  softmax_block(weights, queries, sizes, largest, sums);
  for (int i = 0; i < queries; ++i) {
    const T factor = T(1) / sums[i];
    T* row = weights + i * sizes.keys_pad;
    for (int64_t j = 0; j < sizes.keys_pad; j += kWidth<T>) store(row + j, load(row + j) * factor);
  }
}

// Scores in base 2 -> the softmax weights that they gave, of a query whose log-sum-exp was `lse`
// (in base 2); returns the sum of the weights times their gradients.
template <class T>
inline T recompute_weights(T* weights, const T* grads, const AttentionSizes<T>& sizes, T lse) {
  for (int64_t j = sizes.keys; j < sizes.keys_pad; ++j) weights[j] = -__builtin_inf();
  Vector<T> products = {};
  for (int64_t j = 0; j < sizes.keys_pad; j += kWidth<T>) {
    const Vector<T> p = power_of_two(load(weights + j) - lse);
    store(weights + j, p);
    products += p * load(grads + j);
  }
  return reduce_sum<T>(products);
}

// Gradients of a query's weights -> those of its scores.
template <class T>
inline void score_gradients(const T* weights, T* grads, const AttentionSizes<T>& sizes, T mean) {
  for (int64_t j = 0; j < sizes.keys_pad; j += kWidth<T>) {
    store(grads + j, load(weights + j) * (load(grads + j) - mean));
  }
}

// grad (keys, dim_pad) += by_query (queries, keys)^T . rows (queries, dim_pad)
template <class T>
void add_transposed(const AttentionSizes<T>& sizes, int queries, const T* by_query, const T* rows,
                    int64_t row_stride, T* grad) {
  matmul<T, true>(sizes.keys, sizes.dim_pad, queries, {by_query, 1, sizes.keys_pad}, rows,
                  row_stride, kPanel<T>, grad, sizes.dim_pad);
}

}  // namespace kernelpose::cpu::KP_ISA
