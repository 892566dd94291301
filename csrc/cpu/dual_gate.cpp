// The sum of a channel gate and a spatial gate on the CPU. An image is a table, whose rows are
// pixels in channels_last and channels in contiguous: one pass reduces its rows and its columns
// together, and a second, which finds it in the cache, applies what was made of them.
//
// Where there are fewer images than threads the rows are split into blocks. The blocks do not
// depend on the threads, so neither does the order of any sum.
#include "dual_gate.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "dual_gate_products.h"
#include "table.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

template <class T>
inline T relu(T x) {
  return x < T(0) ? T(0) : x;  // in this order it keeps NaN
}

template <class T>
inline void sigmoids(const T* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kWidth<T> <= count; i += kWidth<T>) store(to + i, sigmoid(load(from + i)));
  for (; i < count; ++i) to[i] = sigmoid(from[i]);
}

// Where the numbers of an image lie in its state.
template <class T>
struct State {
  T* means[2];  // of the channels, of the pixels
  T* largest[2];
  T* gates[2];
  T* hidden;

  State(T* at, const DualGateShape& shape) {
    const int64_t counts[2] = {shape.maps.channels, shape.maps.pixels};
    const auto next = [&](int64_t count) { return std::exchange(at, at + count); };
    for (int i = 0; i < 2; ++i) {
      means[i] = next(counts[i]);
      largest[i] = next(counts[i]);
    }
    for (int i = 0; i < 2; ++i) gates[i] = next(counts[i]);
    hidden = at;
  }
};

// What both directions share: the table, and which of its sides is the channels'.
template <class Element>
struct Gate {
  using T = Compute<Element>;
  const DualGateShape& shape;
  const T* reduce_weight;   // (hidden, channels)
  const T* expand_weight;   // (channels, hidden)
  const T* spatial_weight;  // (2, 7, 7)
  Table table;
  Padded<T> padded;
  int row, column;  // 0 where the rows, or columns, are the channels, 1 where they are the pixels

  Gate(const DualGateShape& s, const void* reduce, const void* expand, const void* spatial)
      : shape(s),
        reduce_weight(static_cast<const T*>(reduce)),
        expand_weight(static_cast<const T*>(expand)),
        spatial_weight(static_cast<const T*>(spatial)),
        table(s.maps),
        padded{s.height(), s.width},
        row(s.maps.channels_last),
        column(!row) {}

  int64_t partial_columns() const { return table.blocks() * 2 * table.columns; }
  int64_t block_begin(int64_t block) const { return block * table.block_rows(); }
  int64_t block_end(int64_t block) const {
    return std::min(table.rows, block_begin(block) + table.block_rows());
  }

  template <int kInputs, class Visit>
  void reduce(const Element* const (&inputs)[kInputs], int64_t block, T* const (&of_rows)[2],
              T* partials, const Visit& visit) const {
    T* const own = partials + block * 2 * table.columns;
    const int64_t first = block_begin(block);
    reduce_rows<kInputs, Element>(inputs, first, block_end(block) - first, table.columns, of_rows,
                                  {own, own + table.columns}, visit);
  }

  // The columns' numbers, of those of the blocks.
  template <class Visit>
  void join_blocks(const T* partials, T* const (&of_columns)[2], const Visit& visit) const {
    for (int64_t c = 0; c < table.columns; ++c) {
      T sum = 0, second = visit.kStart;
      for (int64_t block = 0; block < table.blocks(); ++block) {
        const T* const own = partials + block * 2 * table.columns + c;
        sum += own[0];
        second = visit.join(second, own[table.columns]);
      }
      of_columns[0][c] = sum;
      of_columns[1][c] = second;
    }
  }
};

template <class Element>
struct Forward : Gate<Element> {
  using Base = Gate<Element>;
  using Base::column, Base::padded, Base::row, Base::shape, Base::table;
  using typename Base::T;
  const Element* y;
  Element* out;
  T* states;

  Forward(const Base& base, const void* y_, void* out_, void* states_)
      : Base(base),
        y(static_cast<const Element*>(y_)),
        out(static_cast<Element*>(out_)),
        states(static_cast<T*>(states_)) {}

  State<T> state(int64_t image) const { return {states + image * shape.state(), shape}; }

  int64_t scratch() const {
    const int64_t hidden = round_up(shape.hidden, kWidth<T>);
    return Base::partial_columns() + hidden + padded.size() + padded.result_size();
  }

  void reduce(int64_t image, int64_t block, T* memory) const {
    const State<T> s = state(image);
    Base::template reduce<1>({y + image * shape.maps.image()}, block,
                             {s.means[row], s.largest[row]}, memory, Peaks<T>{});
  }

  void prepare(int64_t image, T* memory) const {
    const State<T> s = state(image);
    Base::join_blocks(memory, {s.means[column], s.largest[column]}, Peaks<T>{});
    const int64_t channels = shape.maps.channels, pixels = shape.maps.pixels;
    for (int64_t c = 0; c < channels; ++c) s.means[0][c] /= T(pixels);
    for (int64_t p = 0; p < pixels; ++p) s.means[1][p] /= T(channels);

    T* const active = memory + Base::partial_columns();
    T* const h = s.hidden;
    multiply<2, T>(Base::reduce_weight, shape.hidden, channels, {s.means[0], s.largest[0]},
                   {h, h + shape.hidden});
    for (int64_t j = 0; j < shape.hidden; ++j) active[j] = relu(h[j]) + relu(h[shape.hidden + j]);
    multiply<1, T>(Base::expand_weight, channels, shape.hidden, {active}, {s.gates[0]});
    sigmoids(s.gates[0], channels, s.gates[0]);

    T* const map = active + round_up(shape.hidden, kWidth<T>);
    T* const result = map + padded.size();
    padded.fill(s.means[1], map);
    padded.template correlate<false>(map, Base::spatial_weight, 1, result);
    padded.fill(s.largest[1], map);
    padded.template correlate<true>(map, Base::spatial_weight + kGateWeights / 2, 1, result);
    for (int64_t i = 0; i < padded.height; ++i) {
      sigmoids(result + i * padded.row(), padded.width, s.gates[1] + i * padded.width);
    }
  }

  void apply(int64_t image, int64_t block, const T*) const {
    const State<T> s = state(image);
    const T* const of_columns = s.gates[column];
    for (int64_t r = Base::block_begin(block); r < Base::block_end(block); ++r) {
      const int64_t at = image * shape.maps.image() + r * table.columns;
      const T of_row = s.gates[row][r];
      int64_t c = 0;
      for (; c + kWidth<T> <= table.columns; c += kWidth<T>) {
        store_elements(out + at + c, load_elements(y + at + c) * (load(of_columns + c) + of_row));
      }
      for (; c < table.columns; ++c) {
        from_compute(to_compute(y[at + c]) * (of_columns[c] + of_row), out[at + c]);
      }
    }
  }
};

// The gradient of y at a place of row r and column c is
// grad_out (gate_r + gate_c) + of_mean_r + of_mean_c, and of_largest_r more where y is the row's
// largest, of_largest_c where it is the column's.
template <class Element>
struct Backward : Gate<Element> {
  using Base = Gate<Element>;
  using Base::column, Base::padded, Base::row, Base::shape, Base::table;
  using typename Base::T;
  const Element* grad_out;
  const Element* y;
  T* states;
  Element* grad_y;
  T* partials;

  Backward(const Base& base, const void* grad_out_, const void* y_, const void* states_,
           void* grad_y_, void* partials_)
      : Base(base),
        grad_out(static_cast<const Element*>(grad_out_)),
        y(static_cast<const Element*>(y_)),
        states(const_cast<T*>(static_cast<const T*>(states_))),
        grad_y(static_cast<Element*>(grad_y_)),
        partials(static_cast<T*>(partials_)) {}

  // of_mean and of_largest of the channels and of the pixels; first the sums of grad_out y, and how
  // many share the largest.
  struct Factors {
    T* of_mean[2];
    T* of_largest[2];
    T* rest;
  };

  Factors factors(T* memory) const {
    const int64_t counts[2] = {shape.maps.channels, shape.maps.pixels};
    T* at = memory + Base::partial_columns();
    const auto next = [&](int64_t count) { return std::exchange(at, at + count); };
    Factors f;
    for (int i = 0; i < 2; ++i) {
      f.of_mean[i] = next(counts[i]);
      f.of_largest[i] = next(counts[i]);
    }
    f.rest = at;
    return f;
  }

  int64_t scratch() const {
    const int64_t of_gates = 3 * shape.maps.channels + shape.hidden;
    return Base::partial_columns() + 2 * (shape.maps.channels + shape.maps.pixels) +
           std::max(of_gates, 2 * padded.size() + padded.result_size());
  }

  State<T> state(int64_t image) const { return {states + image * shape.state(), shape}; }

  Shares<T> shares(int64_t image) const {
    const State<T> s = state(image);
    return {s.largest[row], s.largest[column]};
  }

  void reduce(int64_t image, int64_t block, T* memory) const {
    const int64_t at = image * shape.maps.image();
    const Factors f = factors(memory);
    Base::template reduce<2>({grad_out + at, y + at}, block, {f.of_mean[row], f.of_largest[row]},
                             memory, shares(image));
  }

  void prepare(int64_t image, T* memory) const {
    const Factors f = factors(memory);
    Base::join_blocks(memory, {f.of_mean[column], f.of_largest[column]}, shares(image));
    T* const of_sigmoids = partials + image * shape.partial();
    T* const of_hidden = of_sigmoids + shape.maps.channels;
    prepare_channels(state(image), f, of_sigmoids, of_hidden);
    prepare_pixels(state(image), f, of_hidden + 2 * shape.hidden);
  }

  void prepare_channels(const State<T>& s, const Factors& f, T* of_sigmoids, T* of_hidden) const {
    const int64_t channels = shape.maps.channels, hidden = shape.hidden;
    for (int64_t c = 0; c < channels; ++c) {
      of_sigmoids[c] = f.of_mean[0][c] * s.gates[0][c] * (T(1) - s.gates[0][c]);
    }
    T* const of_active = f.rest;
    multiply_transposed<1, T>(Base::expand_weight, channels, hidden, {of_sigmoids}, {of_active});
    for (int64_t j = 0; j < 2 * hidden; ++j) {
      of_hidden[j] = s.hidden[j] > T(0) ? of_active[j % hidden] : T(0);
    }
    T* const of_largest = of_active + hidden;
    multiply_transposed<2, T>(Base::reduce_weight, hidden, channels,
                              {of_hidden, of_hidden + hidden}, {f.of_mean[0], of_largest});
    for (int64_t c = 0; c < channels; ++c) {
      f.of_mean[0][c] /= T(shape.maps.pixels);
      f.of_largest[0][c] = of_largest[c] / f.of_largest[0][c];
    }
  }

  void prepare_pixels(const State<T>& s, const Factors& f, T* of_kernel) const {
    const int64_t pixels = shape.maps.pixels;
    T* const grad = f.rest;
    T* const map = grad + padded.size();
    T* const result = map + padded.size();
    for (int64_t p = 0; p < pixels; ++p) {
      f.of_mean[1][p] *= s.gates[1][p] * (T(1) - s.gates[1][p]);
    }
    padded.fill(f.of_mean[1], grad);
    for (int k = 0; k < 2; ++k) {
      padded.fill(k ? s.largest[1] : s.means[1], map);
      padded.correlate_maps(map, grad, of_kernel + k * kGateWeights / 2);
      const T* const last = Base::spatial_weight + (k + 1) * kGateWeights / 2 - 1;
      padded.template correlate<false>(grad, last, -1, result);
      for (int64_t p = 0; p < pixels; ++p) {
        const T value = result[p / padded.width * padded.row() + p % padded.width];
        if (k) {
          f.of_largest[1][p] = value / f.of_largest[1][p];
        } else {
          f.of_mean[1][p] = value / T(shape.maps.channels);
        }
      }
    }
  }

  void apply(int64_t image, int64_t block, T* memory) const {
    const State<T> s = state(image);
    const Factors f = factors(memory);
    for (int64_t r = Base::block_begin(block); r < Base::block_end(block); ++r) {
      const int64_t at = image * shape.maps.image() + r * table.columns;
      const auto place = [&](int64_t c, auto zero) {
        using V = decltype(zero);
        const Values<V, 2, Element> in({grad_out + at, y + at}, c);
        const V gates = read<V>(s.gates[column] + c) + s.gates[row][r];
        V sum = in.of[0] * gates + (read<V>(f.of_mean[column] + c) + f.of_mean[row][r]);
        sum += in.of[1] == zero + s.largest[row][r] ? zero + f.of_largest[row][r] : zero;
        return sum + (in.of[1] == read<V>(s.largest[column] + c) ? read<V>(f.of_largest[column] + c)
                                                                 : zero);
      };
      int64_t c = 0;
      for (; c + kWidth<T> <= table.columns; c += kWidth<T>) {
        store_elements(grad_y + at + c, place(c, Vector<T>{}));
      }
      for (; c < table.columns; ++c) from_compute(place(c, T{}), grad_y[at + c]);
    }
  }
};

// Both passes over all images. False: there is no memory.
template <class Op>
bool run_passes(const DualGateShape& shape, int threads, const Op& op) {
  using T = typename Op::T;
  const int64_t batch = shape.maps.batch, blocks = op.table.blocks(), size = op.scratch();
  const int64_t worth = batch * shape.maps.image() / kTaskElements;
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(worth, threads)));
  if (batch >= threads) {
    std::atomic<bool> ran = true;
    parallel_for(batch, threads, [&](int64_t image) {
      T* const memory = static_cast<T*>(thread_scratch(size * sizeof(T)));
      if (!memory) {
        ran = false;
        return;
      }
      for (int64_t block = 0; block < blocks; ++block) op.reduce(image, block, memory);
      op.prepare(image, memory);
      for (int64_t block = 0; block < blocks; ++block) op.apply(image, block, memory);
    });
    return ran;
  }
  T* const memory = static_cast<T*>(thread_scratch(batch * size * sizeof(T)));
  if (!memory) return false;
  parallel_for(batch * blocks, threads, [&](int64_t task) {
    op.reduce(task / blocks, task % blocks, memory + task / blocks * size);
  });
  parallel_for(batch, threads, [&](int64_t image) { op.prepare(image, memory + image * size); });
  parallel_for(batch * blocks, threads, [&](int64_t task) {
    op.apply(task / blocks, task % blocks, memory + task / blocks * size);
  });
  return true;
}

}  // namespace

bool dual_gate_forward(const void* y, const void* reduce_weight, const void* expand_weight,
                       const void* spatial_weight, void* out, void* state,
                       const DualGateShape& shape, DType dtype, int threads) {
  bool ran = false;
  with_element(dtype, [&](auto element) {
    const Gate<decltype(element)> gate(shape, reduce_weight, expand_weight, spatial_weight);
    ran = run_passes(shape, threads, Forward<decltype(element)>(gate, y, out, state));
  });
  return ran;
}

bool dual_gate_backward(const void* grad_out, const void* y, const void* reduce_weight,
                        const void* expand_weight, const void* spatial_weight, const void* state,
                        void* grad_y, void* partials, const DualGateShape& shape, DType dtype,
                        int threads) {
  bool ran = false;
  with_element(dtype, [&](auto element) {
    const Gate<decltype(element)> gate(shape, reduce_weight, expand_weight, spatial_weight);
    const Backward<decltype(element)> op(gate, grad_out, y, state, grad_y, partials);
    ran = run_passes(shape, threads, op);
  });
  return ran;
}

}  // namespace kernelpose::cpu::KP_ISA
