// From the arguments of the C++ functions to those of the kernels.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "kernelpose/dtype.h"
#include "window_attention_tiles.cuh"

namespace kernelpose::cuda {

// Calls run(T{}, std::integral_constant<int, D>{}), D the smallest of the compiled widths that
// holds head_dim.
template <class T, class Run>
cudaError_t dispatch_width(int head_dim, const Run& run) {
  if (head_dim < 1 || head_dim > 128) return cudaErrorInvalidValue;
  if (head_dim <= 32) return run(T{}, std::integral_constant<int, 32>{});
  if (head_dim <= 64) return run(T{}, std::integral_constant<int, 64>{});
  if (head_dim <= 80) return run(T{}, std::integral_constant<int, 80>{});
  return run(T{}, std::integral_constant<int, 128>{});
}

template <class Run>
cudaError_t dispatch(DType dtype, const WindowAttentionShape& shape, const Run& run) {
  const int head_dim = shape.head_dim;
  // What Tokens can count; a map of 1600 x 1600 tokens.
  if (shape.tokens() * shape.columns.size >= int64_t{1} << 32) return cudaErrorInvalidValue;
  switch (dtype) {
    case DType::kFloat32:
      return dispatch_width<float>(head_dim, run);
    case DType::kFloat16:
      return dispatch_width<__half>(head_dim, run);
    case DType::kBFloat16:
      return dispatch_width<__nv_bfloat16>(head_dim, run);
    default:
      return cudaErrorInvalidValue;
  }
}

inline int element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

template <class T>
bool rows_aligned(const WindowAttentionShape& shape, std::initializer_list<const void*> tensors) {
  bool aligned = shape.head_dim * sizeof(T) % 16 == 0;
  for (const void* tensor : tensors) {
    aligned = aligned && reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
  }
  return aligned;
}

template <class T>  // (image, token, head, c)
Matrix<T> token_matrix(T* data, const WindowAttentionShape& shape) {
  return {data, shape.tokens() * shape.channels(), shape.channels()};
}

template <class T>  // part 0, 1 (key, value) of (image, pool, part, head, c)
Matrix<T> pooled_matrix(T* data, int part, const WindowAttentionShape& shape) {
  const int64_t channels = shape.channels();
  return {data + part * channels, shape.pools() * 2 * channels, 2 * channels};
}

template <class T>  // part 0, 1, 2 (q, k, v) of (image, token, part, head, c)
Matrix<T> packed_matrix(T* data, int part, const WindowAttentionShape& shape) {
  const int64_t channels = shape.channels();
  return {data + part * channels, shape.tokens() * 3 * channels, 3 * channels};
}

template <class T>
Keys<T> packed_keys(const T* qkv, const T* means, const WindowAttentionShape& shape) {
  return {packed_matrix(qkv, 1, shape), packed_matrix(qkv, 2, shape),
          pooled_matrix(means, 0, shape), pooled_matrix(means, 1, shape)};
}

}  // namespace kernelpose::cuda
