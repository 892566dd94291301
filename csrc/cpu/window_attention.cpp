// Windowed attention on the CPU: one task is one (image, cell, head).
//
// A cell's keys and values go into the thread's scratch once, keys transposed, and stay in the
// first two cache levels while blocks of kQueries queries pass by:
//
//     Q (kQueries, d) . K^T (d, keys)  ->  scores  ->  softmax in place  ->  . V (keys, d)
//
// so neither scores nor partitioned, rolled or permuted copies of the map ever reach memory. Every
// type but double is computed in float. The backward pass recomputes the scores, and is
// deterministic: each element of a gradient is summed by one task, the bias gradient from one
// partial sum per task in a fixed order.
#include "window_attention.h"

#include <atomic>
#include <memory>
#include <new>

#include "parallel.h"
#include "window_attention_cell.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

constexpr int kQueries = 48;

template <class T>
std::unique_ptr<T[]> allocate(int64_t elements) {
  return std::unique_ptr<T[]>(new (std::nothrow) T[elements]);
}

// Heads follow each other, for they share the pages of a cell's tokens.
struct Task {
  int64_t image;
  int cell;
  int head;

  Task(const WindowAttentionShape& shape, int64_t index)
      : image(index / shape.heads / shape.cells()),
        cell(static_cast<int>(index / shape.heads % shape.cells())),
        head(static_cast<int>(index % shape.heads)) {}
};

// Means of the keys and of the values of every window, for all images and heads: blocks of
// (2, pools, head_dim). Empty where nothing is pooled.
template <class Element>
class PooledKeys {
 public:
  using T = Compute<Element>;

  explicit PooledKeys(const WindowAttentionShape& shape)
      : shape_(shape), part_(int64_t{shape.pools()} * shape.head_dim) {
    if (shape.pooled) means_ = allocate<T>(shape.batch * shape.heads * 2 * part_);
  }

  bool allocated() const { return means_ || !shape_.pooled; }
  // part 0: keys, 1: values; (pools, head_dim)
  T* part(int64_t image, int head, int part) const {
    return means_ ? means_.get() + ((image * shape_.heads + head) * 2 + part) * part_ : nullptr;
  }

  void average(const Element* qkv, int threads) {
    if (!means_) return;
    parallel_for(shape_.batch * shape_.heads * 2, threads, [&](int64_t i) {
      const int part = static_cast<int>(i % 2), head = static_cast<int>(i / 2 % shape_.heads);
      average_part(qkv_view(qkv, shape_, i / 2 / shape_.heads, head, 1 + part),
                   means_.get() + i * part_);
    });
  }

 private:
  void average_part(const HeadView<const Element>& view, T* means) const {
    for (int64_t i = 0; i < part_; ++i) means[i] = 0;
    for (int c = 0; c < shape_.cells(); ++c) {
      T* mean = means + int64_t{cell_pool(shape_, c)} * shape_.head_dim;
      cell_tokens(shape_, c).each([&](int, int64_t token) {
        const Element* row = view.row(token);
        for (int i = 0; i < shape_.head_dim; ++i) mean[i] += to_compute(row[i]);
      });
    }
    for (int64_t i = 0; i < part_; ++i) {
      means[i] /= shape_.pool_tokens(static_cast<int>(i / shape_.head_dim));
    }
  }

  const WindowAttentionShape& shape_;
  int64_t part_;
  std::unique_ptr<T[]> means_;
};

// Reversed bias tables of all heads: (heads, bias_rows * bias_columns), or null without a bias.
template <class T>
std::unique_ptr<T[]> reverse_all(const T* bias, const WindowAttentionShape& shape) {
  const int64_t entries = int64_t{shape.bias_rows()} * shape.bias_columns();
  auto reversed = allocate<T>(shape.heads * entries);
  for (int head = 0; reversed && head < shape.heads; ++head) {
    reverse_table(bias, shape, head, reversed.get() + head * entries);
  }
  return reversed;
}

template <class T>
struct ForwardScratch {
  T *rows, *key_panels, *values, *queries, *scores, *out;
  int64_t size;

  ForwardScratch(const CellSizes<T>& sizes, T* memory) {
    Arena<T> arena(memory);
    const int64_t block = kQueries < sizes.tokens ? kQueries : sizes.tokens;
    for (T** piece : {&rows, &values}) *piece = arena.take(sizes.keys * sizes.dim_pad);
    key_panels = arena.take(panels_size(sizes));
    for (T** piece : {&queries, &out}) *piece = arena.take(block * sizes.dim_pad);
    scores = arena.take(block * sizes.keys_pad);
    size = arena.used();
  }
};

template <class Element>
bool forward(const Element* qkv, const Compute<Element>* bias, Element* out, Compute<Element>* lse,
             const WindowAttentionShape& shape, int threads) {
  using T = Compute<Element>;
  PooledKeys<Element> pooled(shape);
  std::unique_ptr<T[]> reversed;
  if (!pooled.allocated() || (bias && !(reversed = reverse_all(bias, shape)))) return false;
  pooled.average(qkv, threads);
  const int64_t table = int64_t{shape.bias_rows()} * shape.bias_columns();
  const int most = largest_cell(shape);
  const int64_t bytes =
      sizeof(T) * ForwardScratch<T>(CellSizes<T>(shape, most, most), nullptr).size;
  std::atomic<bool> enough_memory{true};

  parallel_for(shape.batch * shape.heads * shape.cells(), threads, [&](int64_t index) {
    const Task task(shape, index);
    T* memory = static_cast<T*>(thread_scratch(bytes));
    if (!memory) {
      enough_memory = false;
      return;
    }
    const CellTokens cell = cell_tokens(shape, task.cell);
    const CellSizes<T> sizes(shape, cell.count(), cell.count());
    const ForwardScratch<T> scratch(sizes, memory);
    const T* head_bias = bias ? reversed.get() + task.head * table : nullptr;
    const auto q = qkv_view(qkv, shape, task.image, task.head, 0);
    const auto k = qkv_view(qkv, shape, task.image, task.head, 1);
    const auto v = qkv_view(qkv, shape, task.image, task.head, 2);
    const auto result = map_view(out, shape, task.image, task.head);
    T* head_lse = lse + (task.image * shape.heads + task.head) * shape.tokens();
    gather_keys(k, cell, pooled.part(task.image, task.head, 0), sizes, scratch.rows);
    transpose_to_panels(scratch.rows, sizes, scratch.key_panels);
    gather_keys(v, cell, pooled.part(task.image, task.head, 1), sizes, scratch.values);

    for (int first = 0; first < sizes.tokens; first += kQueries) {
      const int queries = sizes.tokens - first < kQueries ? sizes.tokens - first : kQueries;
      int64_t tokens[kQueries];
      cell.list(first, queries, tokens);
      for (int i = 0; i < queries; ++i) {
        gather_row(q.row(tokens[i]), T(shape.scale * kLog2E), sizes,
                   scratch.queries + i * sizes.dim_pad);
      }
      block_scores(shape, cell, sizes, first, queries, scratch.queries, scratch.key_panels,
                   head_bias, scratch.scores);
      T largest[kQueries], sums[kQueries];
      softmax_block(scratch.scores, queries, sizes, largest, sums);
      for (int i = 0; i < queries; ++i) {
        head_lse[tokens[i]] = T(kLn2) * (largest[i] + logarithm2(sums[i]));
      }
      matmul<T, false>(queries, sizes.dim_pad, sizes.keys, {scratch.scores, sizes.keys_pad, 1},
                       scratch.values, sizes.dim_pad, kPanel<T>, scratch.out, sizes.dim_pad);
      for (int i = 0; i < queries; ++i) {
        write_row(scratch.out + i * sizes.dim_pad, sizes.head_dim, T(1) / sums[i],
                  result.row(tokens[i]));
      }
    }
  });
  return enough_memory;
}

template <class T>
struct BackwardScratch {
  T *keys, *values, *grad_keys, *grad_values;  // (keys, dim_pad)
  T *key_panels, *value_panels;
  T *queries, *grad_out, *grad_queries;  // (block, dim_pad); queries times scale * log2(e)
  T *weights, *grad_scores;              // (block, keys_pad)
  int64_t size;

  BackwardScratch(const CellSizes<T>& sizes, T* memory) {
    Arena<T> arena(memory);
    const int64_t block = kQueries < sizes.tokens ? kQueries : sizes.tokens;
    for (T** piece : {&keys, &values, &grad_keys, &grad_values}) {
      *piece = arena.take(sizes.keys * sizes.dim_pad);
    }
    for (T** piece : {&key_panels, &value_panels}) *piece = arena.take(panels_size(sizes));
    for (T** piece : {&queries, &grad_out, &grad_queries}) {
      *piece = arena.take(block * sizes.dim_pad);
    }
    for (T** piece : {&weights, &grad_scores}) *piece = arena.take(block * sizes.keys_pad);
    size = arena.used();
  }
};

template <class Element>
struct BackwardTensors {
  using T = Compute<Element>;
  const Element *grad_out, *qkv, *out;
  const T *bias, *lse;
  Element* grad_qkv;
  T* grad_bias;
};

template <class Element>
class Backward {
  using T = Compute<Element>;
  using Tensors = BackwardTensors<Element>;

 public:
  Backward(const Tensors& tensors, const WindowAttentionShape& shape, int threads)
      : tensors_(tensors),
        shape_(shape),
        threads_(threads),
        table_(int64_t{shape.bias_rows()} * shape.bias_columns()),
        pooled_(shape),
        grad_pooled_(shape) {}

  bool run() {
    const int64_t heads = shape_.batch * shape_.heads, tasks = heads * shape_.cells();
    if (!pooled_.allocated() || !grad_pooled_.allocated()) return false;
    if (tensors_.bias && !(reversed_ = reverse_all(tensors_.bias, shape_))) return false;
    if (tensors_.grad_bias && !(partials_ = allocate<T>(tasks * table_))) return false;
    if (shape_.pooled) {
      pooled_.average(tensors_.qkv, threads_);
      parallel_for(heads, threads_, [&](int64_t i) { pooled_gradients(i); });
    }
    parallel_for(tasks, threads_, [&](int64_t i) { cell_gradients(i); });
    if (tensors_.grad_bias && enough_memory_) {
      parallel_for(shape_.heads, threads_, [&](int64_t head) { reduce_bias(head); });
    }
    return enough_memory_;
  }

 private:
  // Gradients of the pooled keys and values of one image and head: all queries of the map.
  void pooled_gradients(int64_t index) {
    const int64_t image = index / shape_.heads;
    const int head = static_cast<int>(index % shape_.heads);
    const CellTokens map = whole_map(shape_);
    const CellSizes<T> sizes(shape_, map.count(), 0);
    BackwardScratch<T> scratch(sizes, nullptr);
    if (!scan(image, head, map, sizes, nullptr, nullptr, &scratch)) return;
    for (int j = 0; j < shape_.pools(); ++j) {
      for (int c = 0; c < shape_.head_dim; ++c) {
        const int64_t to = int64_t{j} * shape_.head_dim + c, from = j * sizes.dim_pad + c;
        grad_pooled_.part(image, head, 0)[to] = scratch.grad_keys[from];
        grad_pooled_.part(image, head, 1)[to] = scratch.grad_values[from];
      }
    }
  }

  void cell_gradients(int64_t index) {
    const Task task(shape_, index);
    const CellTokens cell = cell_tokens(shape_, task.cell);
    const CellSizes<T> sizes(shape_, cell.count(), cell.count());
    const T* reversed = reversed_ ? reversed_.get() + task.head * table_ : nullptr;
    T* partial = partials_ ? partials_.get() + index * table_ : nullptr;
    BackwardScratch<T> scratch(sizes, nullptr);
    if (!scan(task.image, task.head, cell, sizes, reversed, partial, &scratch)) return;
    if (shape_.pooled) {
      const int pool = cell_pool(shape_, task.cell);
      add_pooled(grad_pooled_.part(task.image, task.head, 0), pool, sizes, scratch.grad_keys);
      add_pooled(grad_pooled_.part(task.image, task.head, 1), pool, sizes, scratch.grad_values);
    }
    const auto grad_k = qkv_view(tensors_.grad_qkv, shape_, task.image, task.head, 1);
    const auto grad_v = qkv_view(tensors_.grad_qkv, shape_, task.image, task.head, 2);
    cell.each([&](int i, int64_t token) {
      write_row(scratch.grad_keys + i * sizes.dim_pad, sizes.head_dim, kKeyFactor,
                grad_k.row(token));
      write_row(scratch.grad_values + i * sizes.dim_pad, sizes.head_dim, T(1), grad_v.row(token));
    });
  }

  // Each token of the cell gets its share of the gradient of the mean that it entered.
  void add_pooled(const T* grad_pooled, int pool, const CellSizes<T>& sizes, T* grads) const {
    const T share = T(1) / shape_.pool_tokens(pool);
    for (int i = 0; i < sizes.own_keys; ++i) {
      for (int c = 0; c < sizes.head_dim; ++c) {
        grads[i * sizes.dim_pad + c] += share * grad_pooled[int64_t{pool} * sizes.head_dim + c];
      }
    }
  }

  // Passes all queries of `cell` by its keys: leaves the gradients of keys and values in the
  // scratch, and, where the cell's own keys count, writes those of the queries and adds up the bias
  // partial.
  bool scan(int64_t image, int head, const CellTokens& cell, const CellSizes<T>& sizes,
            const T* reversed, T* partial, BackwardScratch<T>* memory) {
    T* start = static_cast<T*>(thread_scratch(sizeof(T) * memory->size));
    if (!start) {
      enough_memory_ = false;
      return false;
    }
    const BackwardScratch<T> scratch(sizes, start);
    *memory = scratch;
    gather_keys(qkv_view(tensors_.qkv, shape_, image, head, 1), cell, pooled_.part(image, head, 0),
                sizes, scratch.keys);
    gather_keys(qkv_view(tensors_.qkv, shape_, image, head, 2), cell, pooled_.part(image, head, 1),
                sizes, scratch.values);
    transpose_to_panels(scratch.keys, sizes, scratch.key_panels);
    transpose_to_panels(scratch.values, sizes, scratch.value_panels);
    for (int64_t i = 0; i < sizes.keys * sizes.dim_pad; ++i) {
      scratch.grad_keys[i] = scratch.grad_values[i] = 0;
    }
    for (int64_t i = 0; partial && i < table_; ++i) partial[i] = 0;

    for (int first = 0; first < sizes.tokens; first += kQueries) {
      const int queries = sizes.tokens - first < kQueries ? sizes.tokens - first : kQueries;
      int64_t tokens[kQueries];
      cell.list(first, queries, tokens);
      block_gradients(image, head, cell, sizes, first, queries, tokens, reversed, scratch);
      add_transposed(sizes, queries, scratch.grad_scores, scratch.queries, sizes.dim_pad,
                     scratch.grad_keys);
      add_transposed(sizes, queries, scratch.weights, scratch.grad_out, sizes.dim_pad,
                     scratch.grad_values);
      if (sizes.own_keys == 0) continue;
      matmul<T, false>(queries, sizes.dim_pad, sizes.keys, {scratch.grad_scores, sizes.keys_pad, 1},
                       scratch.keys, sizes.dim_pad, kPanel<T>, scratch.grad_queries, sizes.dim_pad);
      const auto grad_q = qkv_view(tensors_.grad_qkv, shape_, image, head, 0);
      for (int i = 0; i < queries; ++i) {
        write_row(scratch.grad_queries + i * sizes.dim_pad, sizes.head_dim, T(shape_.scale),
                  grad_q.row(tokens[i]));
        if (!partial) continue;
        each_bias_run(shape_, cell, first + i, scratch.grad_scores + i * sizes.keys_pad,
                      [&](const T* run, int64_t from, int count) {
                        for (int x = 0; x < count; ++x) partial[from + x] += run[x];
                      });
      }
    }
    return true;
  }

  // Loads a block of queries; leaves its softmax weights and the gradient of its scores.
  void block_gradients(int64_t image, int head, const CellTokens& cell, const CellSizes<T>& sizes,
                       int first, int queries, const int64_t* tokens, const T* reversed,
                       const BackwardScratch<T>& scratch) const {
    const auto q = qkv_view(tensors_.qkv, shape_, image, head, 0);
    const auto grad_out = map_view(tensors_.grad_out, shape_, image, head);
    const auto out = map_view(tensors_.out, shape_, image, head);
    const T* lse = tensors_.lse + (image * shape_.heads + head) * shape_.tokens();
    for (int i = 0; i < queries; ++i) {
      const int64_t token = tokens[i];
      gather_row(q.row(token), T(shape_.scale * kLog2E), sizes,
                 scratch.queries + i * sizes.dim_pad);
      gather_row(grad_out.row(token), T(1), sizes, scratch.grad_out + i * sizes.dim_pad);
    }
    block_scores(shape_, cell, sizes, first, queries, scratch.queries, scratch.key_panels, reversed,
                 scratch.weights);
    matmul<T, false>(queries, sizes.keys_pad, sizes.dim_pad, {scratch.grad_out, sizes.dim_pad, 1},
                     scratch.value_panels, kPanel<T>, kPanel<T> * sizes.dim_pad,
                     scratch.grad_scores, sizes.keys_pad);
    for (int i = 0; i < queries; ++i) {
      T* weights = scratch.weights + i * sizes.keys_pad;
      T* grads = scratch.grad_scores + i * sizes.keys_pad;
      const int64_t token = tokens[i];
      T mean = recompute_weights(weights, grads, sizes, lse[token] * T(kLog2E));
      // The mean of the weights' gradients: summed here where all keys of the query are at hand,
      // which is exact where `out` was rounded; else through out, to which it is equal.
      if (sizes.own_keys == 0) {
        const T* grad_row = scratch.grad_out + i * sizes.dim_pad;
        const Element* out_row = out.row(token);
        mean = 0;
        for (int c = 0; c < sizes.head_dim; ++c) mean += grad_row[c] * to_compute(out_row[c]);
      }
      score_gradients(weights, grads, sizes, mean);
    }
  }

  // Gradients of the keys are sums over scaled queries, which carry log2(e): this takes it out.
  static constexpr T kKeyFactor = T(kLn2);

  // Partials are reversed tables, one a task.
  void reduce_bias(int64_t head) {
    for (int64_t entry = 0; entry < table_; ++entry) {
      T sum = 0;
      for (int64_t i = 0; i < shape_.batch * shape_.cells(); ++i) {
        sum += partials_[(i * shape_.heads + head) * table_ + table_ - 1 - entry];
      }
      tensors_.grad_bias[entry * shape_.heads + head] = sum;
    }
  }

  const Tensors tensors_;
  const WindowAttentionShape& shape_;
  const int threads_;
  const int64_t table_;
  PooledKeys<Element> pooled_, grad_pooled_;
  std::unique_ptr<T[]> reversed_, partials_;
  std::atomic<bool> enough_memory_{true};
};

template <class Element>
bool backward(const void* grad_out, const void* qkv, const void* bias, const void* out,
              const void* lse, void* grad_qkv, void* grad_bias, const WindowAttentionShape& shape,
              int threads) {
  using T = Compute<Element>;
  const BackwardTensors<Element> tensors{static_cast<const Element*>(grad_out),
                                         static_cast<const Element*>(qkv),
                                         static_cast<const Element*>(out),
                                         static_cast<const T*>(bias),
                                         static_cast<const T*>(lse),
                                         static_cast<Element*>(grad_qkv),
                                         static_cast<T*>(grad_bias)};
  return Backward<Element>(tensors, shape, threads).run();
}

template <class Element>
bool forward(const void* qkv, const void* bias, void* out, void* lse,
             const WindowAttentionShape& shape, int threads) {
  using T = Compute<Element>;
  return forward(static_cast<const Element*>(qkv), static_cast<const T*>(bias),
                 static_cast<Element*>(out), static_cast<T*>(lse), shape, threads);
}

}  // namespace

bool window_attention_forward(const void* qkv, const void* bias, void* out, void* lse,
                              const WindowAttentionShape& shape, DType dtype, int threads) {
  switch (dtype) {
    case DType::kFloat32:
      return forward<float>(qkv, bias, out, lse, shape, threads);
    case DType::kFloat16:
      return forward<Half>(qkv, bias, out, lse, shape, threads);
    case DType::kBFloat16:
      return forward<BFloat16>(qkv, bias, out, lse, shape, threads);
    case DType::kFloat64:
      return forward<double>(qkv, bias, out, lse, shape, threads);
  }
  return false;
}

bool window_attention_backward(const void* grad_out, const void* qkv, const void* bias,
                               const void* out, const void* lse, void* grad_qkv, void* grad_bias,
                               const WindowAttentionShape& shape, DType dtype, int threads) {
  const auto run = [&](auto element) {
    return backward<decltype(element)>(grad_out, qkv, bias, out, lse, grad_qkv, grad_bias, shape,
                                       threads);
  };
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat16:
      return run(Half{});
    case DType::kBFloat16:
      return run(BFloat16{});
    case DType::kFloat64:
      return run(double{});
  }
  return false;
}

}  // namespace kernelpose::cpu::KP_ISA
