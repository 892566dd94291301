// Residual addition and LayerNorm on the CPU: a few rows after the other, which stay in the cache
// between their passes.
#include "add_layer_norm.h"

#include <cmath>

#include "channel_passes.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

// A vector of elements, or one of them, in the compute type.
template <class V, class Element>
inline V get(const Element* from) {
  if constexpr (std::is_same_v<V, Compute<Element>>) {
    return to_compute(*from);
  } else {
    return load_elements(from);
  }
}
template <class V, class Element>
inline void put(Element* to, V v) {
  if constexpr (std::is_same_v<V, Compute<Element>>) {
    from_compute(v, *to);
  } else {
    store_elements(to, v);
  }
}

// Rows that are taken together: their sums wait for each other's lanes, not for their own.
constexpr int kRows = 4;

// Calls visit(k, c, sums) for every vector of kCount rows, and every number that is left; what it
// adds to the sums (of vectors or of numbers) of row k is added up.
template <int kCount, int kSums, class T, class Visit>
inline void sum_rows(int64_t channels, T (&sums)[kCount][kSums], const Visit& visit) {
  constexpr int n = kWidth<T>;
  Vector<T> parts[kCount][kSums] = {};
  int64_t c = 0;
  for (; c + n <= channels; c += n) {
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) visit(k, c, parts[k]);
  }
  T rest[kCount][kSums] = {};
  for (; c < channels; ++c) {
    for (int k = 0; k < kCount; ++k) visit(k, c, rest[k]);
  }
  for (int k = 0; k < kCount; ++k) {
    for (int i = 0; i < kSums; ++i) sums[k][i] = reduce_sum<T>(parts[k][i]) + rest[k][i];
  }
}

// Calls visit(c, a vector or a number) alike, for its type.
template <class T, class Visit>
inline void for_columns(int64_t channels, const Visit& visit) {
  constexpr int n = kWidth<T>;
  int64_t c = 0;
  for (; c + n <= channels; c += n) visit(c, Vector<T>{});
  for (; c < channels; ++c) visit(c, T{});
}

// What visits do to get at the numbers: nothing is read through `this` or a reference there, for a
// store might have changed it, as far as a compiler knows.
template <class Narrow, class Element>
struct Forward {
  using T = Compute<Element>;
  const AddLayerNormShape& shape;
  const Narrow* x;
  const Element* residual;
  const T* weight;
  const T* bias;
  Element* sum;
  Element* norm;
  T* moments;

  template <int kCount>
  void rows(int64_t first) const {
    const int64_t channels = shape.channels, at = first * channels;
    const Narrow* const of_x = x + at;
    const Element* const of_residual = residual + at;
    Element *const of_sum = sum + at, *const of_norm = norm + at;
    const T *const of_weight = weight, *const of_bias = bias;
    T totals[kCount][1], squares[kCount][1];
    sum_rows(channels, totals, [=](int k, int64_t c, auto& sums) {
      using V = std::remove_reference_t<decltype(sums[0])>;
      const int64_t i = k * channels + c;
      put<V>(of_sum + i, get<V>(of_x + i) + get<V>(of_residual + i));
      sums[0] += get<V>(of_sum + i);  // as rounded
    });
    std::array<T, kCount> means, inverses;
    for (int k = 0; k < kCount; ++k) means[k] = totals[k][0] / T(channels);
    sum_rows(channels, squares, [=](int k, int64_t c, auto& sums) {
      using V = std::remove_reference_t<decltype(sums[0])>;
      const V d = get<V>(of_sum + k * channels + c) - means[k];
      sums[0] += d * d;
    });
    for (int k = 0; k < kCount; ++k) {
      inverses[k] = T(1) / std::sqrt(squares[k][0] / T(channels) + T(shape.eps));
    }
    for_columns<T>(channels, [=](int64_t c, auto zero) {
      using V = decltype(zero);
      const V scale = get<V>(of_weight + c), offset = get<V>(of_bias + c);
#pragma GCC unroll 4
      for (int k = 0; k < kCount; ++k) {
        const int64_t i = k * channels + c;
        put<V>(of_norm + i, (get<V>(of_sum + i) - means[k]) * inverses[k] * scale + offset);
      }
    });
    if (!moments) return;
    for (int k = 0; k < kCount; ++k) {
      moments[first + k] = means[k];
      moments[shape.rows + first + k] = inverses[k];
    }
  }
};

template <class Narrow, class Element>
struct Backward {
  using T = Compute<Element>;
  const AddLayerNormShape& shape;
  const Element* grad_sum;
  const Element* grad_norm;
  const Element* sum;
  const T* moments;
  const T* weight;
  Element* grad_residual;
  Narrow* grad_x;

  // Adds to the gradients of the parameters, (2, channels), what the rows give to them.
  template <int kCount, bool kGradSum>
  void rows(int64_t first, T* parameters) const {
    const int64_t channels = shape.channels, at = first * channels;
    const Element *const of_grad = grad_norm + at, *const of_sum = sum + at;
    const Element* const more = kGradSum ? grad_sum + at : nullptr;
    const T* const of_weight = weight;
    Element* const result = grad_residual + at;
    Narrow* const result_x = std::is_same_v<Narrow, Element> ? nullptr : grad_x + at;
    std::array<T, kCount> means, inverses, means_h, means_hn;
    for (int k = 0; k < kCount; ++k) {
      means[k] = moments[first + k];
      inverses[k] = moments[shape.rows + first + k];
    }
    T sums_h[kCount][2];
    sum_rows(channels, sums_h, [=](int k, int64_t c, auto& sums) {
      using V = std::remove_reference_t<decltype(sums[0])>;
      const int64_t i = k * channels + c;
      const V h = get<V>(of_grad + i) * get<V>(of_weight + c);
      sums[0] += h;
      sums[1] += h * ((get<V>(of_sum + i) - means[k]) * inverses[k]);
    });
    for (int k = 0; k < kCount; ++k) {
      means_h[k] = sums_h[k][0] / T(channels);
      means_hn[k] = sums_h[k][1] / T(channels);
    }
    for_columns<T>(channels, [=](int64_t c, auto zero) {
      using V = decltype(zero);
      const V scale = get<V>(of_weight + c);
      V grad_weight = get<V>(parameters + c), grad_bias = get<V>(parameters + channels + c);
#pragma GCC unroll 4
      for (int k = 0; k < kCount; ++k) {
        const int64_t i = k * channels + c;
        const V g = get<V>(of_grad + i), n = (get<V>(of_sum + i) - means[k]) * inverses[k];
        V grad = (g * scale - means_h[k] - n * means_hn[k]) * inverses[k];
        if constexpr (kGradSum) grad += get<V>(more + i);
        put<V>(result + i, grad);
        if constexpr (!std::is_same_v<Narrow, Element>) put<V>(result_x + i, grad);
        grad_weight += g * n;
        grad_bias += g;
      }
      put<V>(parameters + c, grad_weight);
      put<V>(parameters + channels + c, grad_bias);
    });
  }
};

// run(element of x, element of sum).
template <class Run>
bool with_elements(const AddLayerNormTypes& types, const Run& run) {
  bool ran = false;
  with_element(types.sum, [&](auto element) {
    if (types.x == types.sum) {
      ran = run(element, element);
    } else if constexpr (std::is_same_v<decltype(element), float>) {
      ran = types.x == DType::kFloat16 ? run(Half{}, element) : run(BFloat16{}, element);
    }
  });
  return ran;
}

// `count` parameters in the compute type: as they lie, or converted into `memory`.
template <class T>
const T* parameters_as(const void* given, DType dtype, int64_t count, T* memory) {
  const T* result = static_cast<const T*>(given);
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    if constexpr (!std::is_same_v<Element, T> && std::is_same_v<Compute<Element>, T>) {
      read_row(static_cast<const Element*>(given), static_cast<int>(count), T(1), memory);
      result = memory;
    }
  });
  return result;
}

// Rows of a task: as many whatever the threads, for sums over rows are taken task by task.
int64_t task_rows(const AddLayerNormShape& shape) {
  return std::max<int64_t>(1, kTaskElements / shape.channels);
}
int64_t tasks_of(const AddLayerNormShape& shape) {
  return (shape.rows + task_rows(shape) - 1) / task_rows(shape);
}

// run(first row, end, task) for each task.
template <class Run>
void for_tasks(const AddLayerNormShape& shape, int threads, const Run& run) {
  const int64_t some = task_rows(shape);
  parallel_for(tasks_of(shape), threads, [&](int64_t task) {
    run(task * some, std::min(shape.rows, (task + 1) * some), task);
  });
}

}  // namespace

bool add_layer_norm_forward(const void* x, const void* residual, const void* weight,
                            const void* bias, void* sum, void* norm, void* moments,
                            const AddLayerNormShape& shape, const AddLayerNormTypes& types,
                            int threads) {
  return with_elements(types, [&](auto narrow, auto element) {
    using Narrow = decltype(narrow);
    using Element = decltype(element);
    using T = Compute<Element>;
    const int64_t channels = shape.channels;
    T* const memory = static_cast<T*>(thread_scratch(2 * channels * sizeof(T)));
    if (!memory) return false;
    const Forward<Narrow, Element> op{
        shape,
        static_cast<const Narrow*>(x),
        static_cast<const Element*>(residual),
        parameters_as<T>(weight, types.parameters, channels, memory),
        parameters_as<T>(bias, types.parameters, channels, memory + channels),
        static_cast<Element*>(sum),
        static_cast<Element*>(norm),
        static_cast<T*>(moments)};
    const size_t bytes = shape.rows * channels * sizeof(Element);
    prefer_huge_pages(sum, bytes);
    prefer_huge_pages(norm, bytes);
    for_tasks(shape, threads, [&](int64_t first, int64_t end, int64_t) {
      int64_t row = first;
      for (; row + kRows <= end; row += kRows) op.template rows<kRows>(row);
      for (; row < end; ++row) op.template rows<1>(row);
    });
    return true;
  });
}

bool add_layer_norm_backward(const void* grad_sum, const void* grad_norm, const void* sum,
                             const void* moments, const void* weight, void* grad_residual,
                             void* grad_x, void* grad_parameters, const AddLayerNormShape& shape,
                             const AddLayerNormTypes& types, int threads) {
  return with_elements(types, [&](auto narrow, auto element) {
    using Narrow = decltype(narrow);
    using Element = decltype(element);
    using T = Compute<Element>;
    const int64_t channels = shape.channels, tasks = tasks_of(shape);
    // The weight, and each task's part of the gradients of the parameters.
    T* const memory = static_cast<T*>(thread_scratch((1 + 2 * tasks) * channels * sizeof(T)));
    if (!memory) return false;
    T* const parts = memory + channels;
    const Backward<Narrow, Element> op{shape,
                                       static_cast<const Element*>(grad_sum),
                                       static_cast<const Element*>(grad_norm),
                                       static_cast<const Element*>(sum),
                                       static_cast<const T*>(moments),
                                       parameters_as<T>(weight, types.parameters, channels, memory),
                                       static_cast<Element*>(grad_residual),
                                       static_cast<Narrow*>(grad_x)};
    prefer_huge_pages(grad_residual, shape.rows * channels * sizeof(Element));
    for_tasks(shape, threads, [&](int64_t first, int64_t end, int64_t task) {
      T* const part = parts + task * 2 * channels;
      std::fill(part, part + 2 * channels, T(0));
      const auto run = [&](auto given) {
        int64_t row = first;
        for (; row + kRows <= end; row += kRows) op.template rows<kRows, given>(row, part);
        for (; row < end; ++row) op.template rows<1, given>(row, part);
      };
      grad_sum ? run(std::true_type{}) : run(std::false_type{});
    });
    T* const result = static_cast<T*>(grad_parameters);
    std::copy(parts, parts + 2 * channels, result);
    for (int64_t task = 1; task < tasks; ++task) {
      const T* const part = parts + task * 2 * channels;
      for (int64_t c = 0; c < 2 * channels; ++c) result[c] += part[c];
    }
    return true;
  });
}

}  // namespace kernelpose::cpu::KP_ISA
