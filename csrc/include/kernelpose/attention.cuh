// What the kernels of the attention ops share: from their arguments to a template, how many stages
// a ring of columns has, and the scores of a chunk.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "kernelpose/dtype.h"
#include "kernelpose/launch.cuh"
#include "kernelpose/warp_tile.cuh"

namespace kernelpose {

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
cudaError_t dispatch_type(DType dtype, int head_dim, const Run& run) {
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

// Whether rows of heads can be copied 16 bytes at a time.
template <class T>
bool rows_aligned(int head_dim, std::initializer_list<const void*> tensors) {
  bool aligned = head_dim * sizeof(T) % 16 == 0;
  for (const void* tensor : tensors) {
    aligned = aligned && reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
  }
  return aligned;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The most shared memory of a block that every GPU since sm_80 has, sm_86 and sm_89 included.
constexpr int kSharedLimit = 99 * 1024;

// Stages of a ring for `tiles` column tiles of `stage` bytes beside `fixed` bytes: all tiles if
// they leave room for two blocks a multiprocessor, else two, or one where two are too many.
inline int ring_stages(int64_t tiles, int64_t stage, int64_t fixed) {
  constexpr int64_t kComfortable = 80 * 1024;
  int stages = tiles < kMaxStages ? static_cast<int>(tiles) : kMaxStages;
  while (stages > 2 && fixed + stages * stage > kComfortable) --stages;
  while (stages > 1 && fixed + stages * stage > kSharedLimit) --stages;
  return stages;
}

// A launch of a one-dimensional grid, which may have too many blocks.
template <class... P, class... A>
cudaError_t launch_blocks(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes,
                          cudaStream_t stream, A&&... args) {
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, stream,
                std::forward<A>(args)...);
}

template <int N>
__device__ __forceinline__ void scale_scores(float (&s)[N / 8][4], float scale) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] *= scale;
  }
}

// -inf from column `count` on.
template <int N>
__device__ __forceinline__ void hide_columns(float (&s)[N / 8][4], int count, int lane) {
  if (count >= N) return;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (8 * j + 2 * (lane & 3) + (i & 1) >= count) s[j][i] = -INFINITY;
    }
  }
}

// A step of the softmax with a running maximum, in base 2: the scores of a chunk become its
// weights, relative to the new maximum; what was summed before is rescaled. sum: of this lane's
// columns.
template <int D, int N>
__device__ __forceinline__ void softmax_step(float (&s)[N / 8][4], float (&o)[D / 8][4],
                                             float (&maximum)[2], float (&sum)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = maximum[half];
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      top = fmaxf(top, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
    }
    top = row_max(top);
    const float rescale = exp2_approx(maximum[half] - top);
    maximum[half] = top;
    sum[half] *= rescale;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      o[j][2 * half] *= rescale;
      o[j][2 * half + 1] *= rescale;
    }
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        s[j][i] = exp2_approx(s[j][i] - top);
        sum[half] += s[j][i];
      }
    }
  }
}

}  // namespace kernelpose
