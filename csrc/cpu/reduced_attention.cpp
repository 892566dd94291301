// Attention to a reduced map on the CPU: one task is one (image, head) and a chunk of its queries.
//
// The head's keys, transposed and scaled, and its values stay in the first two cache levels while
// blocks of kQueries queries pass by:
//
//     Q (kQueries, d) . K^T (d, keys)  ->  softmax  ->  . V (keys, d)  ->  out
//
// Up to a panel of keys the scores live in registers until they are weights; else they stay in the
// cache. Where elements are of the compute type, queries are read and results written in place.
// Every type but double is computed in float. The backward pass recomputes the weights; the
// gradients of keys and values are summed over a chunk by its task, then over chunks in order.
#include "reduced_attention.h"

#include <atomic>
#include <memory>
#include <new>

#include "attention.h"
#include "parallel.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

constexpr int kQueries = 48;          // a multiple of the tiles' rows
constexpr int kChunk = 8 * kQueries;  // whatever the number of threads: sums keep their order

struct Task {
  int64_t image;
  int head;
  int chunk, first, end;  // queries

  // Heads follow each other, for they share the pages of the queries.
  Task(const ReducedAttentionShape& shape, int chunks, int64_t index)
      : image(index / shape.heads / chunks),
        head(static_cast<int>(index % shape.heads)),
        chunk(static_cast<int>(index / shape.heads % chunks)),
        first(chunk * kChunk),
        end(shape.queries - first < kChunk ? shape.queries : first + kChunk) {}
};

inline int chunks_of(const ReducedAttentionShape& shape) {
  return static_cast<int>(round_up(shape.queries, kChunk) / kChunk);
}

// One head of q, out or their gradients, (image, token, head, c).
template <class Element>
HeadView<Element> query_view(Element* tokens, const ReducedAttentionShape& shape, int64_t image,
                             int head) {
  const int64_t channels = shape.channels();
  return {tokens + image * shape.queries * channels + int64_t{head} * shape.head_dim, channels};
}

// One head of part 0, 1 (keys, values) of kv or its gradient, (image, key, part, head, c).
template <class Element>
HeadView<Element> key_view(Element* kv, const ReducedAttentionShape& shape, int64_t image, int head,
                           int part) {
  const int64_t channels = shape.channels();
  return {kv + image * shape.keys * 2 * channels + part * channels + int64_t{head} * shape.head_dim,
          2 * channels};
}

template <class Element>
void gather_rows(const HeadView<const Element>& view, int first, int count, Compute<Element> factor,
                 const AttentionSizes<Compute<Element>>& sizes, Compute<Element>* rows) {
  for (int i = 0; i < count; ++i) {
    gather_row(view.row(first + i), factor, sizes, rows + i * sizes.dim_pad);
  }
}

template <class Element>
void scatter_rows(const Compute<Element>* rows, int first, int count, Compute<Element> factor,
                  const AttentionSizes<Compute<Element>>& sizes, const HeadView<Element>& view) {
  for (int i = 0; i < count; ++i) {
    scatter_row(rows + i * sizes.dim_pad, factor, sizes, view.row(first + i));
  }
}

// A block of rows as a factor of products reads them.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
};

// In place where that is possible, else copied to `scratch`. A right factor's rows are whole
// vectors, and dense: they are read many times.
template <class Element, bool kRight>
Rows<Compute<Element>> read_block(const HeadView<const Element>& view, int first, int count,
                                  const AttentionSizes<Compute<Element>>& sizes,
                                  Compute<Element>* scratch) {
  if constexpr (std::is_same_v<Element, Compute<Element>>) {
    if (!kRight || view.stride == sizes.dim_pad) return {view.row(first), view.stride};
  }
  gather_rows(view, first, count, Compute<Element>(1), sizes, scratch);
  return {scratch, sizes.dim_pad};
}

// left (count, keys) . right (keys, dim_pad) -> rows of `view`.
template <class Element>
void write_product(const HeadView<Element>& view, int first, int count,
                   const AttentionSizes<Compute<Element>>& sizes, const Compute<Element>* left,
                   const Compute<Element>* right, Compute<Element>* scratch) {
  using T = Compute<Element>;
  const auto multiply = [&](T* to, int64_t stride) {
    matmul<T, false>(count, sizes.dim_pad, sizes.keys, {left, sizes.keys_pad, 1}, right,
                     sizes.dim_pad, kPanel<T>, to, stride);
  };
  if constexpr (std::is_same_v<Element, T>) {
    if (sizes.head_dim == sizes.dim_pad) return multiply(view.row(first), view.stride);
  }
  multiply(scratch, sizes.dim_pad);
  scatter_rows(scratch, first, count, T(1), sizes, view);
}

template <class T>
struct ForwardScratch {
  T *key_panels, *values;
  T* rows;     // (keys or a block, dim_pad): keys, then queries, then results
  T* weights;  // (block, keys_pad)
  int64_t size;

  ForwardScratch(const AttentionSizes<T>& sizes, T* memory) {
    Arena<T> arena(memory);
    key_panels = arena.take(panels_size(sizes));
    values = arena.take(sizes.keys * sizes.dim_pad);
    rows = arena.take((sizes.keys > kQueries ? sizes.keys : kQueries) * sizes.dim_pad);
    weights = arena.take(kQueries * sizes.keys_pad);
    size = arena.used();
  }
};

template <class Element>
bool forward(const Element* q, const Element* kv, Element* out, Compute<Element>* lse,
             const ReducedAttentionShape& shape, int threads) {
  using T = Compute<Element>;
  const AttentionSizes<T> sizes(shape.keys, shape.head_dim);
  const int chunks = chunks_of(shape);
  const int64_t bytes = sizeof(T) * ForwardScratch<T>(sizes, nullptr).size;
  std::atomic<bool> enough_memory{true};
  prefer_huge_pages(out, shape.batch * shape.queries * shape.channels() * sizeof(Element));
  parallel_for(shape.batch * chunks * shape.heads, threads, [&](int64_t index) {
    T* memory = static_cast<T*>(thread_scratch(bytes));
    if (!memory) {
      enough_memory = false;
      return;
    }
    const ForwardScratch<T> scratch(sizes, memory);
    const Task task(shape, chunks, index);
    const auto queries = query_view(q, shape, task.image, task.head);
    const auto results = query_view(out, shape, task.image, task.head);
    gather_rows(key_view(kv, shape, task.image, task.head, 0), 0, shape.keys,
                T(shape.scale * kLog2E), sizes, scratch.rows);
    transpose_to_panels(scratch.rows, sizes, scratch.key_panels);
    gather_rows(key_view(kv, shape, task.image, task.head, 1), 0, shape.keys, T(1), sizes,
                scratch.values);
    for (int first = task.first; first < task.end; first += kQueries) {
      const int count = task.end - first < kQueries ? task.end - first : kQueries;
      const Rows<T> block = read_block<Element, false>(queries, first, count, sizes, scratch.rows);
      T largest[kQueries], sums[kQueries];
      softmax_weights(count, sizes, {block.data, block.stride, 1}, scratch.key_panels,
                      scratch.weights, largest, sums);
      write_product(results, first, count, sizes, scratch.weights, scratch.values, scratch.rows);
      if (!lse) continue;
      T* head_lse = lse + (task.image * shape.heads + task.head) * shape.queries + first;
      for (int i = 0; i < count; ++i) {
        head_lse[i] = largest[i] + logarithm2(sums[i]);
      }
    }
  });
  return enough_memory;
}

template <class T>
struct BackwardScratch {
  T *key_panels, *value_panels;  // of scale * log2(e) * keys, and of the values
  T* keys;                       // (keys, dim_pad), times scale
  T *grad_keys, *grad_values;    // (keys, dim_pad); the first lacks the factor scale
  T *queries, *grad_out, *rows;  // (block, dim_pad); rows: (keys, dim_pad) at first
  T *weights, *grad_scores;      // (block, keys_pad)
  int64_t size;

  BackwardScratch(const AttentionSizes<T>& sizes, T* memory) {
    Arena<T> arena(memory);
    for (T** piece : {&key_panels, &value_panels}) *piece = arena.take(panels_size(sizes));
    for (T** piece : {&keys, &grad_keys, &grad_values}) {
      *piece = arena.take(sizes.keys * sizes.dim_pad);
    }
    for (T** piece : {&queries, &grad_out}) *piece = arena.take(kQueries * sizes.dim_pad);
    rows = arena.take((sizes.keys > kQueries ? sizes.keys : kQueries) * sizes.dim_pad);
    for (T** piece : {&weights, &grad_scores}) *piece = arena.take(kQueries * sizes.keys_pad);
    size = arena.used();
  }
};

template <class Element>
struct BackwardTensors {
  const Element *grad_out, *q, *kv;
  const Compute<Element>* lse;
  Element *grad_q, *grad_kv;
};

template <class Element>
class Backward {
  using T = Compute<Element>;

 public:
  Backward(const BackwardTensors<Element>& tensors, const ReducedAttentionShape& shape, int threads)
      : tensors_(tensors),
        shape_(shape),
        threads_(threads),
        chunks_(chunks_of(shape)),
        sizes_(shape.keys, shape.head_dim),
        part_(int64_t{shape.keys} * sizes_.dim_pad) {}

  bool run() {
    const int64_t tasks = shape_.batch * chunks_ * shape_.heads;
    if (chunks_ > 1) {
      partials_.reset(new (std::nothrow) T[tasks * 2 * part_]);
      if (!partials_) return false;
    }
    const int64_t elements = shape_.batch * shape_.queries * shape_.channels();
    prefer_huge_pages(tensors_.grad_q, elements * sizeof(Element));
    parallel_for(tasks, threads_, [&](int64_t index) { chunk_gradients(index); });
    if (chunks_ > 1 && enough_memory_) {
      parallel_for(shape_.batch * shape_.heads, threads_, [&](int64_t i) {
        sum_chunks(i / shape_.heads, static_cast<int>(i % shape_.heads));
      });
    }
    return enough_memory_;
  }

 private:
  // Gradients of a chunk's queries; those of keys and values over the chunk go to its partial, or
  // where they belong if there is no other chunk.
  void chunk_gradients(int64_t index) {
    const int64_t bytes = sizeof(T) * BackwardScratch<T>(sizes_, nullptr).size;
    T* memory = static_cast<T*>(thread_scratch(bytes));
    if (!memory) {
      enough_memory_ = false;
      return;
    }
    BackwardScratch<T> scratch(sizes_, memory);
    if (partials_) {
      scratch.grad_keys = partials_.get() + index * 2 * part_;
      scratch.grad_values = scratch.grad_keys + part_;
    }
    const Task task(shape_, chunks_, index);
    const T scale = T(shape_.scale);
    const auto k = key_view(tensors_.kv, shape_, task.image, task.head, 0);
    const auto v = key_view(tensors_.kv, shape_, task.image, task.head, 1);
    gather_rows(k, 0, shape_.keys, T(shape_.scale * kLog2E), sizes_, scratch.rows);
    transpose_to_panels(scratch.rows, sizes_, scratch.key_panels);
    gather_rows(v, 0, shape_.keys, T(1), sizes_, scratch.rows);
    transpose_to_panels(scratch.rows, sizes_, scratch.value_panels);
    gather_rows(k, 0, shape_.keys, scale, sizes_, scratch.keys);
    for (int64_t i = 0; i < part_; ++i) scratch.grad_keys[i] = scratch.grad_values[i] = 0;
    for (int first = task.first; first < task.end; first += kQueries) {
      block_gradients(task, first, scratch);
    }
    if (!partials_) write_gradients(task.image, task.head, scratch.grad_keys, scratch.grad_values);
  }

  void block_gradients(const Task& task, int first, const BackwardScratch<T>& scratch) const {
    const int count = task.end - first < kQueries ? task.end - first : kQueries;
    const auto grad_q = query_view(tensors_.grad_q, shape_, task.image, task.head);
    const Rows<T> q =
        read_block<Element, true>(query_view(tensors_.q, shape_, task.image, task.head), first,
                                  count, sizes_, scratch.queries);
    const Rows<T> grad_out =
        read_block<Element, true>(query_view(tensors_.grad_out, shape_, task.image, task.head),
                                  first, count, sizes_, scratch.grad_out);
    const T* lse = tensors_.lse + (task.image * shape_.heads + task.head) * shape_.queries + first;
    by_keys(count, q, scratch.key_panels, scratch.weights);
    by_keys(count, grad_out, scratch.value_panels, scratch.grad_scores);
    for (int i = 0; i < count; ++i) {
      T* weights = scratch.weights + i * sizes_.keys_pad;
      T* grads = scratch.grad_scores + i * sizes_.keys_pad;
      score_gradients(weights, grads, sizes_, recompute_weights(weights, grads, sizes_, lse[i]));
    }
    write_product(grad_q, first, count, sizes_, scratch.grad_scores, scratch.keys, scratch.rows);
    add_transposed(sizes_, count, scratch.grad_scores, q.data, q.stride, scratch.grad_keys);
    add_transposed(sizes_, count, scratch.weights, grad_out.data, grad_out.stride,
                   scratch.grad_values);
  }

  // rows (count, head_dim) . panels (head_dim, keys_pad)
  void by_keys(int count, const Rows<T>& rows, const T* panels, T* product) const {
    matmul<T, false>(count, sizes_.keys_pad, sizes_.head_dim, {rows.data, rows.stride, 1}, panels,
                     kPanel<T>, kPanel<T> * sizes_.dim_pad, product, sizes_.keys_pad);
  }

  // Adds the partials of all chunks to the first.
  void sum_chunks(int64_t image, int head) const {
    T* total = partials_.get() + (image * chunks_ * shape_.heads + head) * 2 * part_;
    for (int chunk = 1; chunk < chunks_; ++chunk) {
      const T* partial = total + int64_t{chunk} * shape_.heads * 2 * part_;
      for (int64_t i = 0; i < 2 * part_; ++i) total[i] += partial[i];
    }
    write_gradients(image, head, total, total + part_);
  }

  void write_gradients(int64_t image, int head, const T* grad_keys, const T* grad_values) const {
    scatter_rows(grad_keys, 0, shape_.keys, T(shape_.scale), sizes_,
                 key_view(tensors_.grad_kv, shape_, image, head, 0));
    scatter_rows(grad_values, 0, shape_.keys, T(1), sizes_,
                 key_view(tensors_.grad_kv, shape_, image, head, 1));
  }

  const BackwardTensors<Element> tensors_;
  const ReducedAttentionShape& shape_;
  const int threads_, chunks_;
  const AttentionSizes<T> sizes_;
  const int64_t part_;
  std::unique_ptr<T[]> partials_;  // (image, chunk, head, keys and values, keys, dim_pad)
  std::atomic<bool> enough_memory_{true};
};

// Calls run(Element{}) for the element type of a tensor.
template <class Run>
bool dispatch(DType dtype, Run run) {
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

}  // namespace

bool reduced_attention_forward(const void* q, const void* kv, void* out, void* lse,
                               const ReducedAttentionShape& shape, DType dtype, int threads) {
  return dispatch(dtype, [&](auto element) {
    using Element = decltype(element);
    return forward(static_cast<const Element*>(q), static_cast<const Element*>(kv),
                   static_cast<Element*>(out), static_cast<Compute<Element>*>(lse), shape, threads);
  });
}

bool reduced_attention_backward(const void* grad_out, const void* q, const void* kv,
                                const void* lse, void* grad_q, void* grad_kv,
                                const ReducedAttentionShape& shape, DType dtype, int threads) {
  return dispatch(dtype, [&](auto element) {
    using Element = decltype(element);
    const BackwardTensors<Element> tensors{
        static_cast<const Element*>(grad_out), static_cast<const Element*>(q),
        static_cast<const Element*>(kv),       static_cast<const Compute<Element>*>(lse),
        static_cast<Element*>(grad_q),         static_cast<Element*>(grad_kv)};
    return Backward<Element>(tensors, shape, threads).run();
  });
}

}  // namespace kernelpose::cpu::KP_ISA
