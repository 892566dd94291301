// Products of 16-row tiles by one warp: on tensor cores for 16-bit elements, by float32 FMA for
// float. Accumulators lie alike for both, so that a kernel is written once: with g = lane / 4 and
// t = lane % 4, c[j][0..3] holds (g, 8j + 2t), (g, 8j + 2t + 1), (g + 8, 8j + 2t), (g + 8, 8j + 2t
// + 1).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernelpose/numerics.cuh"
#include "kernelpose/ptx.cuh"

namespace kernelpose {

// A block is kWarps warps of 16 rows. 32-bit elements take half the rows, for the same bytes.
template <class T>
struct Tile {
  static constexpr int kWarps = sizeof(T) == 4 ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps;  // rows of a tile in shared memory
  static constexpr int kChunk = kRows / 2;   // columns of scores that a warp holds at a time
};

// For __launch_bounds__: blocks a multiprocessor that hold as many warps as `blocks` of 4 warps, so
// that a kernel gets the same registers whatever the element type.
template <class T>
constexpr int resident_blocks(int blocks) {
  return blocks * 4 / Tile<T>::kWarps;
}

// Elements from one row in shared memory to the next. 16 bytes of padding make it an odd multiple
// of 16 bytes, so that 8 rows at one column lie in different banks.
template <class T, int D>
constexpr int kRowStride = D + 16 / static_cast<int>(sizeof(T));

// The left factor of products: 16 rows of D elements in shared memory. kHeld keeps 16-bit ones in
// D / 4 registers; otherwise every product reads them anew.
template <class T, int D, bool kHeld>
struct RowOperand {
  uint32_t held[kHeld ? D / 16 : 1][4];
  const T* rows;

  __device__ __forceinline__ void load(const T* shared_rows, int lane) {
    rows = shared_rows + (lane & 15) * kRowStride<T, D> + (lane >> 4) * 8;
    if (kHeld) {
#pragma unroll
      for (int k = 0; k < D / 16; ++k) ldmatrix_x4(held[kHeld ? k : 0], rows + 16 * k);
    }
  }

  __device__ __forceinline__ void fragment(int k, uint32_t (&a)[4]) const {
    if (kHeld) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = held[kHeld ? k : 0][i];
    } else {
      ldmatrix_x4(a, rows + 16 * k);
    }
  }
};

template <int D, bool kHeld>
struct RowOperand<float, D, kHeld> {
  const float* rows;
  __device__ __forceinline__ void load(const float* shared_rows, int) { rows = shared_rows; }
};

// c (16 x N) = left (16 x D) * columns (N x D)^T
template <int N, class T, int D, bool kHeld, std::enable_if_t<sizeof(T) == 2, int> = 0>
__device__ __forceinline__ void multiply_transposed(float (&c)[N / 8][4],
                                                    const RowOperand<T, D, kHeld>& left,
                                                    const T* columns, int lane) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[j][i] = 0.f;
  }
  const T* base =
      columns + ((lane & 7) + ((lane >> 4) << 3)) * kRowStride<T, D> + ((lane >> 3) & 1) * 8;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[4];
    left.fragment(k, a);
#pragma unroll
    for (int j = 0; j < N / 16; ++j) {
      uint32_t b[4];
      ldmatrix_x4(b, base + 16 * j * kRowStride<T, D> + 16 * k);
      mma_m16n8k16<T>(c[2 * j], a, {b[0], b[1]}, c[2 * j]);
      mma_m16n8k16<T>(c[2 * j + 1], a, {b[2], b[3]}, c[2 * j + 1]);
    }
  }
}

template <int N, int D, bool kHeld>
__device__ __forceinline__ void multiply_transposed(float (&c)[N / 8][4],
                                                    const RowOperand<float, D, kHeld>& left,
                                                    const float* columns, int lane) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[j][i] = 0.f;
  }
  constexpr int kStride = kRowStride<float, D>;
  const float* row = left.rows + (lane >> 2) * kStride;
  const float* column = columns + 2 * (lane & 3) * kStride;
  const auto dot = [](float4 x, float4 y, float sum) {
    return fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, sum))));
  };
  const auto at = [](const float* p) { return *reinterpret_cast<const float4*>(p); };
#pragma unroll 4
  for (int k = 0; k < D; k += 4) {
    const float4 a0 = at(row + k), a1 = at(row + 8 * kStride + k);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float4 b0 = at(column + 8 * j * kStride + k);
      const float4 b1 = at(column + (8 * j + 1) * kStride + k);
      c[j][0] = dot(a0, b0, c[j][0]);
      c[j][1] = dot(a0, b1, c[j][1]);
      c[j][2] = dot(a1, b0, c[j][2]);
      c[j][3] = dot(a1, b1, c[j][3]);
    }
  }
}

// c (16 x D) += left (16 x N, accumulators of an earlier product, rounded to T) * right (N x D)
template <int D, int N, class T, std::enable_if_t<sizeof(T) == 2, int> = 0>
__device__ __forceinline__ void add_product(float (&c)[D / 8][4], const float (&left)[N / 8][4],
                                            const T* right, int lane) {
  const T* base = right + (lane & 15) * kRowStride<T, D> + (lane >> 4) * 8;
#pragma unroll
  for (int k = 0; k < N / 16; ++k) {
    const uint32_t a[4] = {pack<T>(left[2 * k][0], left[2 * k][1]),
                           pack<T>(left[2 * k][2], left[2 * k][3]),
                           pack<T>(left[2 * k + 1][0], left[2 * k + 1][1]),
                           pack<T>(left[2 * k + 1][2], left[2 * k + 1][3])};
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, base + 16 * k * kRowStride<T, D> + 16 * j);
      mma_m16n8k16<T>(c[2 * j], a, {b[0], b[1]}, c[2 * j]);
      mma_m16n8k16<T>(c[2 * j + 1], a, {b[2], b[3]}, c[2 * j + 1]);
    }
  }
}

template <int D, int N>
__device__ __forceinline__ void add_product(float (&c)[D / 8][4], const float (&left)[N / 8][4],
                                            const float* right, int lane) {
  constexpr int kStride = kRowStride<float, D>;
  const float* column = right + 2 * (lane & 3);
#pragma unroll
  for (int k = 0; k < N / 8; ++k) {
    for (int t = 0; t < 4; ++t) {  // the four lanes of a row hold two weights each
      const int source = (lane & ~3) | t;
      float weight[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) weight[i] = __shfl_sync(0xffffffffu, left[k][i], source);
      const float* row = column + (8 * k + 2 * t) * kStride;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        const float2 first = *reinterpret_cast<const float2*>(row + 8 * j);
        const float2 second = *reinterpret_cast<const float2*>(row + kStride + 8 * j);
        c[j][0] = fmaf(weight[1], second.x, fmaf(weight[0], first.x, c[j][0]));
        c[j][1] = fmaf(weight[1], second.y, fmaf(weight[0], first.y, c[j][1]));
        c[j][2] = fmaf(weight[3], second.x, fmaf(weight[2], first.x, c[j][2]));
        c[j][3] = fmaf(weight[3], second.y, fmaf(weight[2], first.y, c[j][3]));
      }
    }
  }
}

// Reduces over the four lanes that share a row; all of them get the result.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// A row of each of two matrices in global memory. Where the row does not exist, a and b are legal
// addresses all the same.
template <class T>
struct RowPair {
  const T *a, *b;
  bool exists;
};

template <class P>
__device__ __forceinline__ P* from_lane(P* pointer, int lane) {
  return reinterpret_cast<P*>(
      __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(pointer), lane));
}

// Called by a warp: copies 16 rows of two matrices (of the first, if !kTwo) from global to shared
// memory, D elements each, zeros for the columns from `width` on and for rows that do not exist.
// Lane l names row l % 16. `aligned`: all rows begin at 16-byte boundaries and width is a multiple
// of 16 bytes; the copies are asynchronous then, and the caller commits and waits.
template <class T, int D, bool kTwo>
__device__ __forceinline__ void copy_rows(T* first, T* second, const RowPair<T>& pair, int lane,
                                          int width, bool aligned) {
  constexpr int kVector = 16 / sizeof(T);
  constexpr int kVectors = D / kVector;
  const unsigned existing = __ballot_sync(0xffffffffu, pair.exists);
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kVectors / 2; ++i) {  // half a row a lane
      const int row = (lane + 32 * i) / kVectors, column = (lane + 32 * i) % kVectors * kVector;
      const bool exists = (existing >> row & 1) != 0 && column < width;
      const int target = row * kRowStride<T, D> + column, offset = exists ? column : 0;
      cp_async_16(first + target, from_lane(pair.a, row) + offset, exists);
      if constexpr (kTwo) cp_async_16(second + target, from_lane(pair.b, row) + offset, exists);
    }
  } else {
#pragma unroll 1
    for (int row = 0; row < 16; ++row) {
      const T* const a = from_lane(pair.a, row);
      const T* const b = from_lane(pair.b, row);
#pragma unroll 1
      for (int column = lane; column < D; column += 32) {
        const bool exists = (existing >> row & 1) != 0 && column < width;
        const int target = row * kRowStride<T, D> + column;
        first[target] = exists ? a[column] : from_float<T>(0.f);
        if constexpr (kTwo) second[target] = exists ? b[column] : from_float<T>(0.f);
      }
    }
  }
}

// Every other 16 bytes of the product of two rows in global memory, from the first (which = 0) or
// the second (1) on.
template <class T, int D>
__device__ __forceinline__ float half_dot(const T* a, const T* b, int which, int width,
                                          bool aligned) {
  constexpr int kVector = 16 / sizeof(T);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < D / kVector; i += 2) {
    const int column = (i + which) * kVector;
    if (column >= width) break;
    alignas(16) T x[kVector], y[kVector];
    if (aligned) {
      *reinterpret_cast<uint4*>(x) = __ldg(reinterpret_cast<const uint4*>(a + column));
      *reinterpret_cast<uint4*>(y) = __ldg(reinterpret_cast<const uint4*>(b + column));
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const bool inside = column + e < width;
        x[e] = inside ? a[column + e] : from_float<T>(0.f);
        y[e] = inside ? b[column + e] : from_float<T>(0.f);
      }
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) sum = fmaf(to_float(x[e]), to_float(y[e]), sum);
  }
  return sum;
}

// Called by a warp: writes 16 rows of accumulators, times factor[0] for rows 0..7 and factor[1] for
// rows 8..15, to global memory, through `staging`: 16 rows of shared memory that no other warp
// touches. Lane l names row l % 16, or nullptr where there is none.
template <class T, int D>
__device__ __forceinline__ void store_rows(const float (&c)[D / 8][4], const float (&factor)[2],
                                           T* staging, T* target, int lane, int width,
                                           bool aligned) {
  constexpr int kVector = 16 / sizeof(T);
  constexpr int kVectors = D / kVector;
  constexpr int kStride = kRowStride<T, D>;
  __syncwarp();  // whatever the warp read from staging
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* at = staging + ((lane >> 2) + 8 * half) * kStride + 8 * j + 2 * (lane & 3);
      const float x = c[j][2 * half] * factor[half], y = c[j][2 * half + 1] * factor[half];
      if constexpr (sizeof(T) == 2) {
        *reinterpret_cast<uint32_t*>(at) = pack<T>(x, y);
      } else {
        *reinterpret_cast<float2*>(at) = make_float2(x, y);
      }
    }
  }
  __syncwarp();
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kVectors / 2; ++i) {
      const int row = (lane + 32 * i) / kVectors, column = (lane + 32 * i) % kVectors * kVector;
      T* const to = from_lane(target, row);
      if (to == nullptr || column >= width) continue;
      *reinterpret_cast<uint4*>(to + column) =
          *reinterpret_cast<const uint4*>(staging + row * kStride + column);
    }
  } else {
#pragma unroll 1
    for (int row = 0; row < 16; ++row) {
      T* const to = from_lane(target, row);
#pragma unroll 1
      for (int column = lane; to != nullptr && column < width; column += 32) {
        to[column] = staging[row * kStride + column];
      }
    }
  }
  // No barrier here: the next copy_rows into staging has each lane write the bytes it just read.
}

// Waits for the tile in whose stage the next copy will go, with one group committed a stage.
__device__ __forceinline__ void wait_for_tile(int stages) {
  switch (stages) {
    case 1:
      return cp_async_wait<0>();
    case 2:
      return cp_async_wait<1>();
    case 3:
      return cp_async_wait<2>();
    default:
      return cp_async_wait<3>();
  }
}

constexpr int kMaxStages = 4;

// Runs compute(tile, stage) for tiles 0, 1, ... that load(tile, stage) copies into a ring of
// `stages` <= kMaxStages; called by all threads of the block. Up to `stages` tiles stay resident
// after the first pass: later passes say `loaded` and copy nothing.
template <class Load, class Compute>
__device__ __forceinline__ void for_each_tile(int tiles, int stages, bool loaded, const Load& load,
                                              const Compute& compute) {
  if (!loaded) {
    for (int stage = 0; stage < stages; ++stage) {
      if (stage < tiles) load(stage, stage);
      cp_async_commit();
    }
  }
  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    if (!loaded) {
      wait_for_tile(stages);
      __syncthreads();
    }
    compute(tile, stage);
    if (!loaded) {
      if (tile + stages < tiles) {
        __syncthreads();  // every warp is done with the stage
        load(tile + stages, stage);
      }
      cp_async_commit();
    }
    if (++stage == stages) stage = 0;
  }
}

}  // namespace kernelpose
