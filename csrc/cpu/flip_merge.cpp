// Flip test on the CPU: one task is a few maps, read once and written once; a vector of the
// mirrored row is read where it lies and reversed in a register.
#include "flip_merge.h"

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

constexpr int64_t kTaskPixels = 32768;  // fewer are not worth waking a thread for
constexpr int kBlock = 256;             // 16-bit pixels that are converted at a time

template <class V, int... I>
inline V reverse(V v, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(v, v, (n - 1 - I)...);
}

// out[i] = mean of straight[i] and mirrored[count - 1 - i]; out is neither.
template <class T>
inline void merge_numbers(const T* straight, const T* mirrored, int64_t count, T* out) {
  constexpr int n = kWidth<T>;
  const T half = T(0.5);
  if (count < n) {
    for (int64_t i = 0; i < count; ++i) out[i] = (straight[i] + mirrored[count - 1 - i]) * half;
    return;
  }
  for (int64_t i = 0; i < count; i += n) {
    i = std::min(i, count - n);  // the last vector overlaps the one before
    const auto back = reverse(load(mirrored + count - n - i), std::make_integer_sequence<int, n>{});
    store(out + i, (load(straight + i) + back) * half);
  }
}

template <class Element>
inline void merge_row(const Element* straight, const Element* mirrored, int64_t count,
                      Element* out) {
  using T = Compute<Element>;
  if constexpr (std::is_same_v<Element, T>) {
    merge_numbers(straight, mirrored, count, out);
  } else {
    T a[kBlock], b[kBlock], mean[kBlock];
    for (int64_t i = 0; i < count; i += kBlock) {
      const int some = static_cast<int>(std::min<int64_t>(kBlock, count - i));
      read_row(straight + i, some, T(1), a);
      read_row(mirrored + count - i - some, some, T(1), b);
      merge_numbers(a, b, some, mean);
      write_row(mean, some, T(1), out + i);
    }
  }
}

template <class Element>
void merge_map(const Element* straight, const Element* mirrored, const FlipMergeShape& shape,
               Element* out) {
  for (int64_t row = 0; row < shape.rows; ++row) {
    const int64_t first = row * shape.width;
    if (shape.shift) {
      const auto sum = to_compute(straight[first]) + to_compute(mirrored[first + shape.width - 1]);
      from_compute(sum * Compute<Element>(0.5), out[first]);
      merge_row(straight + first + 1, mirrored + first + 1, shape.width - 1, out + first + 1);
    } else {
      merge_row(straight + first, mirrored + first, shape.width, out + first);
    }
  }
}

template <class Element>
void merge_maps(const void* heatmaps, const void* flipped, void* out, const int* order, int joints,
                const FlipMergeShape& shape, int threads) {
  const int64_t pixels = shape.pixels();
  const int64_t some = std::max<int64_t>(1, kTaskPixels / pixels);
  parallel_for((shape.maps + some - 1) / some, threads, [&](int64_t task) {
    for (int64_t map = task * some; map < std::min(shape.maps, (task + 1) * some); ++map) {
      const int64_t joint = map % joints, source = map - joint + order[joint];
      merge_map(static_cast<const Element*>(heatmaps) + map * pixels,
                static_cast<const Element*>(flipped) + source * pixels, shape,
                static_cast<Element*>(out) + map * pixels);
    }
  });
}

}  // namespace

void flip_merge(const void* heatmaps, const void* flipped, void* out, const int* order, int joints,
                const FlipMergeShape& shape, DType dtype, int threads) {
  const auto run = [&](auto element) {
    merge_maps<decltype(element)>(heatmaps, flipped, out, order, joints, shape, threads);
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
}

}  // namespace kernelpose::cpu::KP_ISA
