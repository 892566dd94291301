// Products of a warp whose left factor is 16 x 16, in registers, and whose right one lies in shared
// memory, of any row stride that is an odd multiple of 16 bytes. Accumulators as in warp_tile.cuh.
#pragma once

#include <type_traits>

#include "kernelpose/warp_tile.cuh"

namespace kernelpose::cuda {

template <class T>
struct Fragment {
  uint32_t a[4];
};

template <>
struct Fragment<float> {
  float a[2][4];
};

// Of two neighbouring tiles of accumulators, rounded to T.
template <class T>
__device__ __forceinline__ Fragment<T> make_fragment(const float (&c)[4], const float (&next)[4]) {
  if constexpr (sizeof(T) == 2) {
    return {{pack<T>(c[0], c[1]), pack<T>(c[2], c[3]), pack<T>(next[0], next[1]),
             pack<T>(next[2], next[3])}};
  } else {
    return {{{c[0], c[1], c[2], c[3]}, {next[0], next[1], next[2], next[3]}}};
  }
}

// Of 16 rows in shared memory.
template <class T>
__device__ __forceinline__ Fragment<T> load_fragment(const T* rows, int stride, int lane) {
  Fragment<T> result;
  if constexpr (sizeof(T) == 2) {
    ldmatrix_x4(result.a, rows + (lane & 15) * stride + (lane >> 4) * 8);
  } else {
    const float* const own = rows + (lane >> 2) * stride + 2 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair =
          *reinterpret_cast<const float2*>(own + (i & 1) * 8 * stride + (i >> 1) * 8);
      result.a[i >> 1][2 * (i & 1)] = pair.x;
      result.a[i >> 1][2 * (i & 1) + 1] = pair.y;
    }
  }
  return result;
}

// c (16 x N) += left * right (N x 16)^T
template <int N, class T>
__device__ __forceinline__ void add_transposed(float (*c)[4], const Fragment<T>& left,
                                               const T* right, int stride, int lane) {
  if constexpr (sizeof(T) == 2) {
    const T* const own = right + ((lane & 7) + ((lane >> 4) << 3)) * stride + ((lane >> 3) & 1) * 8;
#pragma unroll
    for (int j = 0; j < N / 8; j += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, own + 8 * j * stride);
      mma_m16n8k16<T>(c[j], left.a, {b[0], b[1]}, c[j]);
      mma_m16n8k16<T>(c[j + 1], left.a, {b[2], b[3]}, c[j + 1]);
    }
  } else {
    const float* const own = right + 2 * (lane & 3) * stride;
#pragma unroll
    for (int k = 0; k < 16; k += 2) {  // the four lanes of a row hold two columns each
      float a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = __shfl_sync(0xffffffffu, left.a[k >> 3][i], (lane & ~3) | (k >> 1 & 3));
      }
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const float2 x = *reinterpret_cast<const float2*>(own + 8 * j * stride + k);
        const float2 y = *reinterpret_cast<const float2*>(own + (8 * j + 1) * stride + k);
        c[j][0] = fmaf(a[1], x.y, fmaf(a[0], x.x, c[j][0]));
        c[j][1] = fmaf(a[1], y.y, fmaf(a[0], y.x, c[j][1]));
        c[j][2] = fmaf(a[3], x.y, fmaf(a[2], x.x, c[j][2]));
        c[j][3] = fmaf(a[3], y.y, fmaf(a[2], y.x, c[j][3]));
      }
    }
  }
}

// c (16 x 16) += left * right (16 x 16)
template <class T>
__device__ __forceinline__ void add_product(float (*c)[4], const Fragment<T>& left, const T* right,
                                            int stride, int lane) {
  if constexpr (sizeof(T) == 2) {
    uint32_t b[4];
    ldmatrix_x4_trans(b, right + (lane & 15) * stride + (lane >> 4) * 8);
    mma_m16n8k16<T>(c[0], left.a, {b[0], b[1]}, c[0]);
    mma_m16n8k16<T>(c[1], left.a, {b[2], b[3]}, c[1]);
  } else {
    const float* const own = right + 2 * (lane & 3);
#pragma unroll
    for (int k = 0; k < 16; k += 2) {
      float a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = __shfl_sync(0xffffffffu, left.a[k >> 3][i], (lane & ~3) | (k >> 1 & 3));
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float2 x = *reinterpret_cast<const float2*>(own + k * stride + 8 * j);
        const float2 y = *reinterpret_cast<const float2*>(own + (k + 1) * stride + 8 * j);
        c[j][0] = fmaf(a[1], y.x, fmaf(a[0], x.x, c[j][0]));
        c[j][1] = fmaf(a[1], y.y, fmaf(a[0], x.y, c[j][1]));
        c[j][2] = fmaf(a[3], y.x, fmaf(a[2], x.x, c[j][2]));
        c[j][3] = fmaf(a[3], y.y, fmaf(a[2], x.y, c[j][3]));
      }
    }
  }
}

}  // namespace kernelpose::cuda
