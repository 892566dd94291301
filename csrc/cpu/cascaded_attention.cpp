// Attention of groups in a cascade on the CPU.
//
// A head has few keys and many queries, so what can be done to keys is not done to queries. With n
// a query's normalised channels, K and V the head's keys and values,
//
//     scores = (W_q n + b_q) K^T = [n 1] [K W_q  K b_q]^T,  W_out (P V) = P (V W_out^T),
//
// and a query costs two products, of [n 1] with the folded keys and of its weights P with the
// folded values. The latter hold the output's bias, too (the weights' sum is 1), and are centred
// over channels, which makes the mean that the output's norm subtracts 0.
//
// A group takes two steps: `fold`, head by head, and `attend`, band by band of the map's rows,
// which also reduces what it found, with the next group's channels, to that group's keys. Images
// are tasks where there are enough of them, else heads and bands are. Every type but double is
// computed in float; what a group finds is rounded, and added to the next one's channels, rounded
// again.
#include "cascaded_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>

#include "attention.h"
#include "channel_passes.h"
#include "part_vector.h"
#include "transpose.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

constexpr int kQueries = 48;     // of a tile: a multiple of the products' rows
constexpr int kMostWidth = 128;  // of a group

// Weights and biases in the compute type.
template <class T>
struct Parameters {
  const T *taps, *reduce_bias;  // taps: (group, row and column of the kernel, width_pad)
  const T *q_weight, *q_bias, *kv_weight, *kv_bias, *out_weight, *out_bias;
  const T *norm_weight, *norm_bias;
};

// Those of a call: as they lie where they are of the compute type, else converted. False where
// there is no memory.
template <class Element>
class ParameterMemory {
  using T = Compute<Element>;

 public:
  bool read(const CascadedAttentionTensors& tensors, const CascadedAttentionShape& shape,
            Parameters<T>* to) {
    const int64_t channels = shape.channels(), square = channels * shape.group_width;
    const int64_t taps = int64_t{shape.ratio} * shape.ratio;
    const int64_t width = shape.group_width, width_pad = round_up(width, kWidth<T>);
    const int64_t copies = std::is_same_v<Element, T> ? 0 : 4 * square + 9 * channels;
    memory_.reset(new (std::nothrow) T[shape.groups * taps * width_pad + copies]());
    if (!memory_) return false;
    T* free = memory_.get();
    const auto* const weight = static_cast<const Element*>(tensors.reduce_weight);
    for (int64_t c = 0; c < channels; ++c) {
      T* const first = free + c / width * taps * width_pad + c % width;
      for (int64_t t = 0; t < taps; ++t) first[t * width_pad] = to_compute(weight[c * taps + t]);
    }
    to->taps = free;
    free += shape.groups * taps * width_pad;
    const auto take = [&](const void* given, int64_t count) {
      const auto* const from = static_cast<const Element*>(given);
      if constexpr (std::is_same_v<Element, T>) {
        return from;
      } else {
        T* const copy = free;
        for (int64_t i = 0; i < count; ++i) copy[i] = to_compute(from[i]);
        free += count;
        return static_cast<const T*>(copy);
      }
    };
    to->reduce_bias = take(tensors.reduce_bias, channels);
    to->q_weight = take(tensors.q_weight, square);
    to->q_bias = take(tensors.q_bias, channels);
    to->kv_weight = take(tensors.kv_weight, 2 * square);
    to->kv_bias = take(tensors.kv_bias, 2 * channels);
    to->out_weight = take(tensors.out_weight, square);
    to->out_bias = take(tensors.out_bias, channels);
    to->norm_weight = take(tensors.norm_weight, channels);
    to->norm_bias = take(tensors.norm_bias, channels);
    return true;
  }

 private:
  std::unique_ptr<T[]> memory_;
};

// What one group of an image attends to, (rows, keys_pad) unless said otherwise.
template <class T>
struct Keys {
  T* reduced;          // (width): the normalised reduced map
  T* kv;               // (2 width): keys, times what scales the scores, and values
  T* folded_values_t;  // (heads, width)
  T* folded_keys;      // (heads), panels of width + 1 channels
  T* folded_values;    // (heads, keys, width_pad)

  Keys(const CascadedAttentionShape& shape, const AttentionSizes<T>& sizes, int64_t width_pad,
       Arena<T>& arena) {
    const int64_t width = shape.group_width;
    reduced = arena.take(width * sizes.keys_pad);
    kv = arena.take(2 * width * sizes.keys_pad);
    folded_values_t = arena.take(shape.heads * width * sizes.keys_pad);
    folded_keys = arena.take(shape.heads * panels_size(sizes));
    folded_values = arena.take(shape.heads * sizes.keys * width_pad);
  }
};

// A tile of queries.
template <class T>
struct Tile {
  T* queries;  // (count, sizes.dim_pad): [n 1]
  T* weights;  // (count, keys_pad)
  T* out;      // (count, width_pad)

  Tile(const AttentionSizes<T>& sizes, int64_t width_pad, Arena<T>& arena) {
    queries = arena.take(kQueries * sizes.dim_pad);
    weights = arena.take(kQueries * sizes.keys_pad);
    out = arena.take(kQueries * width_pad);
  }
};

template <class Element>
Vector<Compute<Element>> rounded(Vector<Compute<Element>> v) {
  if constexpr (std::is_same_v<Element, Compute<Element>>) {
    return v;
  } else {
    Element numbers[kWidth<Compute<Element>>];
    store_elements(numbers, v);
    return load_elements(numbers);
  }
}

template <class Element>
class Cascade {
  using T = Compute<Element>;
  static constexpr int n = kWidth<T>;

 public:
  Cascade(const CascadedAttentionTensors& tensors, const CascadedAttentionShape& shape)
      : shape_(shape),
        sizes_(shape.keys(), shape.group_width + 1),
        width_(shape.group_width),
        width_pad_(round_up(width_, n)),
        band_keys_(std::max(1, kQueries / (shape.ratio * shape.width))),
        x_(static_cast<const Element*>(tensors.x)),
        out_(static_cast<Element*>(tensors.out)) {
    for (int i = 0; i < n; ++i) in_last_[i] = width_pad_ - n + i < width_ ? T(1) : T(0);
  }

  bool run(const CascadedAttentionTensors& tensors, int threads) {
    ParameterMemory<Element> memory;
    if (!memory.read(tensors, shape_, &parameters_)) return false;
    prefer_huge_pages(out_, shape_.batch * shape_.queries() * shape_.channels() * sizeof(Element));
    Arena<T> of_keys(nullptr), of_tile(nullptr);
    Keys<T>(shape_, sizes_, width_pad_, of_keys);
    Tile<T>(sizes_, width_pad_, of_tile);
    const int64_t keys_size = of_keys.used(), tile_size = of_tile.used();
    std::atomic<bool> enough_memory{true};
    const auto scratch = [&](int64_t size) {
      T* const piece = static_cast<T*>(thread_scratch(sizeof(T) * size));
      if (!piece) enough_memory = false;
      return piece;
    };
    if (threads == 1 || shape_.batch >= threads) {
      parallel_for(shape_.batch, threads, [&](int64_t image) {
        T* const own = scratch(keys_size + tile_size);
        if (!own) return;
        const auto in_turn = [](int64_t count, const auto& step) {
          for (int64_t i = 0; i < count; ++i) step(i);
        };
        cascade(image, own, in_turn, [&] { return own + keys_size; });
      });
      return enough_memory;
    }
    const std::unique_ptr<T[]> shared(new (std::nothrow) T[keys_size]);
    if (!shared) return false;
    const auto together = [&](int64_t count, const auto& step) {
      parallel_for(count, threads, step);
    };
    for (int64_t image = 0; image < shape_.batch; ++image) {
      cascade(image, shared.get(), together, [&] { return scratch(tile_size); });
    }
    return enough_memory;
  }

 private:
  // each(count, step) runs step(0) ... step(count - 1); tile_memory() is a thread's own, or null.
  template <class Each, class TileMemory>
  void cascade(int64_t image, T* keys_memory, const Each& each,
               const TileMemory& tile_memory) const {
    Arena<T> arena(keys_memory);
    const Keys<T> keys(shape_, sizes_, width_pad_, arena);
    const int rows = shape_.height / shape_.ratio;
    const int64_t bands = (rows + band_keys_ - 1) / band_keys_;
    const auto band = [&](int64_t i, const auto& run) {
      const int first = static_cast<int>(i) * band_keys_;
      run(first, std::min(rows, first + band_keys_));
    };
    each(bands, [&](int64_t i) {
      band(i, [&](int first, int end) { reduce(image, 0, first, end, keys); });
    });
    for (int group = 0; group < shape_.groups; ++group) {
      each(shape_.heads, [&](int64_t head) { fold(group, static_cast<int>(head), keys); });
      each(bands, [&](int64_t i) {
        T* const memory = tile_memory();
        if (!memory) return;
        Arena<T> own(memory);
        const Tile<T> tile(sizes_, width_pad_, own);
        band(i, [&](int first, int end) {
          attend(image, group, first, end, keys, tile);
          if (group + 1 < shape_.groups) reduce(image, group + 1, first, end, keys);
        });
      });
    }
  }

  // A vector of u, zeros after the last of `width` channels. `before` is what the group before
  // found there.
  static Vector<T> channels(const Element* x, const Element* before, int64_t c, int64_t width) {
    const int count = static_cast<int>(width - c);
    const Vector<T> u = load_part(x + c, count);
    return before ? rounded<Element>(u + load_part(before + c, count)) : u;
  }
  const Element* before(const Element* x, int group) const {
    return group ? out_ + (x - x_) - width_ : nullptr;
  }

  // kRows rows, `stride` numbers apart: (row - mean) / deviation, zeros after the last channel
  // before and after. What is used often is copied, for a store might have changed members.
  template <int kRows>
  void normalise(T* rows, int64_t stride, const Vector<T> (&sums)[kRows]) const {
    const int64_t width = width_, width_pad = width_pad_;
    const Vector<T> in_last = in_last_;
    T means[kRows], inverses[kRows];
    for (int k = 0; k < kRows; ++k) means[k] = reduce_sum<T>(sums[k]) / T(width);
    Vector<T> squares[kRows] = {};
    for (int64_t c = 0; c < width_pad; c += n) {
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) {
        Vector<T> v = load(rows + k * stride + c) - means[k];
        if (c + n > width) v *= in_last;
        store(rows + k * stride + c, v);
        squares[k] += v * v;
      }
    }
    inverse_deviations(squares, inverses);
    for (int64_t c = 0; c < width_pad; c += n) {
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) {
        T* const at = rows + k * stride + c;
        store(at, load(at) * inverses[k]);
      }
    }
  }
  template <int kRows>
  void inverse_deviations(const Vector<T> (&squares)[kRows], T (&inverses)[kRows]) const {
    for (int k = 0; k < kRows; ++k) {
      inverses[k] = T(1) / std::sqrt(reduce_sum<T>(squares[k]) / T(width_) + T(shape_.eps));
    }
  }

  // Rows [first, end) of the normalised reduced map.
  void reduce(int64_t image, int group, int first, int end, const Keys<T>& keys) const {
    const int ratio = shape_.ratio, columns = shape_.width / ratio;
    const T* const taps = parameters_.taps + int64_t{group} * ratio * ratio * width_pad_;
    const T* const bias = parameters_.reduce_bias + group * width_;
    const int64_t stride = shape_.channels();
    T row[kMostWidth];
    for (int64_t key = int64_t{first} * columns; key < int64_t{end} * columns; ++key) {
      const int64_t corner = key / columns * ratio * shape_.width + key % columns * ratio;
      const Element* const x = x_ + (image * shape_.queries() + corner) * stride + group * width_;
      const Element* const found = before(x, group);
      Vector<T> sum[1] = {};
      for (int64_t c = 0; c < width_; c += n) {
        Vector<T> reduced = load_part(bias + c, static_cast<int>(width_ - c));
        for (int r = 0; r < ratio; ++r) {
          const int64_t place = r * shape_.width * stride;
          const T* const tap = taps + r * ratio * width_pad_ + c;
          for (int i = 0; i < ratio; ++i) {
            const int64_t at = place + i * stride;
            reduced += channels(x + at, found ? found + at : nullptr, c, width_) *
                       load(tap + i * width_pad_);
          }
        }
        store(row + c, reduced);
        sum[0] += reduced;
      }
      normalise(row, 0, sum);
      for (int64_t c = 0; c < width_; ++c) keys.reduced[c * sizes_.keys_pad + key] = row[c];
    }
  }

  // rows (count, keys_pad): (rows + bias) * factor, zeros after the last key.
  void add_bias(T* rows, int64_t count, const T* bias, T factor) const {
    for (int64_t i = 0; i < count; ++i, rows += sizes_.keys_pad) {
      for (int64_t j = 0; j < sizes_.keys_pad; j += n) {
        store(rows + j, (load(rows + j) + bias[i]) * factor);
      }
      for (int64_t j = sizes_.keys; j < sizes_.keys_pad; ++j) rows[j] = 0;
    }
  }

  // Folded keys and values of a head.
  void fold(int group, int head, const Keys<T>& keys) const {
    const int64_t dim = shape_.head_dim(), first = head * dim, pad = sizes_.keys_pad;
    const int64_t square = group * width_ * width_;
    const auto project = [&](int64_t row, T factor) {
      T* const rows = keys.kv + row * pad;
      matmul<T, false>(dim, pad, width_,
                       {parameters_.kv_weight + 2 * square + row * width_, width_, 1}, keys.reduced,
                       pad, kPanel<T>, rows, pad);
      add_bias(rows, dim, parameters_.kv_bias + 2 * group * width_ + row, factor);
      return rows;
    };
    const T* const k = project(first, T(kLog2E / std::sqrt(static_cast<double>(dim))));
    T* const folded_keys = keys.folded_keys + head * panels_size(sizes_);
    for (int64_t j = 0; j < pad; j += kPanel<T>) {
      const int64_t count = std::min<int64_t>(kPanel<T>, pad - j);
      T* const panel = folded_keys + j * sizes_.dim_pad;
      matmul<T, false>(width_, count, dim,
                       {parameters_.q_weight + square + first * width_, 1, width_}, k + j, pad,
                       kPanel<T>, panel, kPanel<T>);
      matmul<T, false>(1, count, dim, {parameters_.q_bias + group * width_ + first, 1, 1}, k + j,
                       pad, kPanel<T>, panel + width_ * kPanel<T>, kPanel<T>);
    }

    const T* const v = project(width_ + first, T(1));
    T* const turned = keys.folded_values_t + head * width_ * pad;
    matmul<T, false>(width_, pad, dim, {parameters_.out_weight + square + first, width_, 1}, v, pad,
                     kPanel<T>, turned, pad);
    if (head == 0) add_bias(turned, width_, parameters_.out_bias + group * width_, T(1));
    for (int64_t j = 0; j < pad; j += n) {
      Vector<T> sum = {};
      for (int64_t c = 0; c < width_; ++c) sum += load(turned + c * pad + j);
      const Vector<T> mean = sum / T(width_);
      for (int64_t c = 0; c < width_; ++c) {
        T* const at = turned + c * pad + j;
        store(at, load(at) - mean);
      }
    }
    T* const folded_values = keys.folded_values + head * sizes_.keys * width_pad_;
    transpose(turned, width_, sizes_.keys, pad, folded_values, width_pad_);
    for (int64_t j = 0; j < sizes_.keys; ++j) {
      for (int64_t c = width_; c < width_pad_; ++c) folded_values[j * width_pad_ + c] = 0;
    }
  }

  // What the queries in rows [first, end) of the reduced map find.
  void attend(int64_t image, int group, int first, int end, const Keys<T>& keys,
              const Tile<T>& tile) const {
    const int64_t stride = sizes_.dim_pad, row = int64_t{shape_.ratio} * shape_.width;
    const int64_t start = image * shape_.queries();
    for (int64_t query = first * row; query < end * row; query += kQueries) {
      const int count = static_cast<int>(std::min<int64_t>(kQueries, end * row - query));
      by_fours(count, [&](int64_t i, auto rows) {
        read_queries<rows>(start + query + i, group, tile.queries + i * stride, stride);
      });
      for (int head = 0; head < shape_.heads; ++head) {
        T largest[kQueries], sums[kQueries];
        softmax_weights<T>(count, sizes_, {tile.queries, stride, 1},
                           keys.folded_keys + head * panels_size(sizes_), tile.weights, largest,
                           sums);
        const auto multiply = head ? matmul<T, true> : matmul<T, false>;
        multiply(count, width_pad_, sizes_.keys, {tile.weights, sizes_.keys_pad, 1},
                 keys.folded_values + head * sizes_.keys * width_pad_, width_pad_, kPanel<T>,
                 tile.out, width_pad_);
      }
      by_fours(count, [&](int64_t i, auto rows) {
        write<rows>(start + query + i, group, tile.out + i * width_pad_);
      });
    }
  }

  // run(i, number of rows) for `count` rows, four together where so many are left.
  template <class Run>
  static void by_fours(int count, const Run& run) {
    int i = 0;
    for (; i + 4 <= count; i += 4) run(i, std::integral_constant<int, 4>{});
    for (; i < count; ++i) run(i, std::integral_constant<int, 1>{});
  }

  // [n 1] of kRows places.
  template <int kRows>
  void read_queries(int64_t place, int group, T* rows, int64_t stride) const {
    const int64_t width = width_, token = shape_.channels();
    const Element* const x = x_ + place * token + group * width;
    const Element* const found = before(x, group);
    Vector<T> sums[kRows] = {};
    for (int64_t c = 0; c < width; c += n) {
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) {
        const int64_t at = k * token;
        const Vector<T> u = channels(x + at, found ? found + at : nullptr, c, width);
        store(rows + k * stride + c, u);
        sums[k] += u;
      }
    }
    normalise(rows, stride, sums);
    for (int k = 0; k < kRows; ++k) rows[k * stride + width] = 1;
  }

  // The output's norm of kRows centred rows.
  template <int kRows>
  void write(int64_t place, int group, const T* rows) const {
    const int64_t width = width_, width_pad = width_pad_, token = shape_.channels();
    const T* const weight = parameters_.norm_weight + group * width;
    const T* const bias = parameters_.norm_bias + group * width;
    Element* const to = out_ + place * token + group * width;
    Vector<T> squares[kRows] = {};
    for (int64_t c = 0; c < width_pad; c += n) {
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) {
        const Vector<T> v = load(rows + k * width_pad + c);
        squares[k] += v * v;
      }
    }
    T inverses[kRows];
    inverse_deviations(squares, inverses);
    for (int64_t c = 0; c < width; c += n) {
      const int count = static_cast<int>(width - c);
      const Vector<T> scale = load_part(weight + c, count), offset = load_part(bias + c, count);
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) {
        const Vector<T> v = load(rows + k * width_pad + c) * inverses[k];
        store_part(to + k * token + c, v * scale + offset, count);
      }
    }
  }

  const CascadedAttentionShape& shape_;
  const AttentionSizes<T> sizes_;  // of a head's keys, and of [n 1]
  const int64_t width_, width_pad_;
  const int band_keys_;  // rows of the reduced map in a band
  const Element* const x_;
  Element* const out_;
  Vector<T> in_last_;  // 1 where the last vector of channels has one, else 0
  Parameters<T> parameters_;
};

}  // namespace

bool cascaded_attention_forward(const CascadedAttentionTensors& tensors,
                                const CascadedAttentionShape& shape, DType dtype, int threads) {
  bool ran = false;
  with_element(dtype, [&](auto element) {
    ran = Cascade<decltype(element)>(tensors, shape).run(tensors, threads);
  });
  return ran;
}

}  // namespace kernelpose::cpu::KP_ISA
