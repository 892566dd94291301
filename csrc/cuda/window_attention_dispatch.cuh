// From the arguments of the C++ functions to those of the kernels.
#pragma once

#include <initializer_list>

#include "window_attention_tiles.cuh"

namespace kernelpose::cuda {

template <class Run>
cudaError_t dispatch(DType dtype, const WindowAttentionShape& shape, const Run& run) {
  // What Tokens can count; a map of 1600 x 1600 tokens.
  if (shape.tokens() * shape.columns.size >= int64_t{1} << 32) return cudaErrorInvalidValue;
  return dispatch_type(dtype, shape.head_dim, run);
}

template <class T>
bool rows_aligned(const WindowAttentionShape& shape, std::initializer_list<const void*> tensors) {
  return kernelpose::rows_aligned<T>(shape.head_dim, tensors);
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
