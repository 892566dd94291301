// What a block of inverted_bottleneck works on: the problem, its tile, rows on their way to shared
// memory and products of what lies there.
#pragma once

#include <cstdint>

#include "kernelpose/host_device.h"
#include "kernelpose/inverted_bottleneck.h"
#include "kernelpose/vector.cuh"
#include "kernelpose/warp_tile.cuh"

namespace kernelpose::cuda::bottleneck {

constexpr int kMostWarps = 8;
constexpr int kMostNear = 16 * kMostWarps;  // pixels with those around them
constexpr int kRun = 4;                     // outputs of a row whose depthwise sums a thread has

template <class T>
constexpr int kChunk = 64 / static_cast<int>(sizeof(T));  // hidden channels at a time

// Elements from one pixel's chunk to the next. 80 bytes: rows of a product lie in different banks,
// and so do two pixels kRun apart.
template <class T>
constexpr int kChunkStride = kRowStride<T, kChunk<T>>;

template <class T>
constexpr int kMostSlice = sizeof(T) == 2 ? 256 : 160;  // input channels at a time

template <class T>
struct Problem {
  const T *x, *expand, *expand_bias, *depthwise, *depthwise_bias, *project, *project_bias;
  T* out;
  int height, width, out_height, out_width;
  int inputs, hidden, outputs;
  int stride;  // 0: no depthwise convolution; an image is then one row
  bool residual;
  Activation act1, act2;
  int slice, slices;  // input channels at a time, a multiple of 16
  bool aligned_x, aligned_expand, aligned_project, aligned_out;  // for accesses of 16 bytes
  // Of a tile: output pixels, and the pixels of x that they are made of, both in products of 16
  // rows too. Numbers of the problem rather than of the kernel, which has no registers to spare.
  int rows, columns, own_products;
  int near_columns, near, near_products;
  int across, tiles;  // of an image

  void set_tile(int tile_rows, int tile_columns) {
    const auto around = [&](int side) { return stride == 0 ? side : (side - 1) * stride + 3; };
    rows = tile_rows;
    columns = tile_columns;
    own_products = (rows * columns + 15) / 16;
    near_columns = around(columns);
    near = around(rows) * near_columns;
    near_products = (near + 15) / 16;
    across = (out_width + columns - 1) / columns;
    tiles = across * ((out_height + rows - 1) / rows);
  }
  KP_HOST_DEVICE int slice_stride() const { return slice + kWidestVector<T>; }
};

template <class T>
__device__ __forceinline__ float2 load_pair(const T* p) {
  const auto pair = load_vector<2>(p);
  return make_float2(to_float(pair.values[0]), to_float(pair.values[1]));
}

template <class T>
__device__ __forceinline__ void store_pair(T* p, float x, float y) {
  store_vector(p, ElementVector<T, 2>{{from_float<T>(x), from_float<T>(y)}});
}

// x / (1 + e^-x); far out, where e^-x overflows, it is 0 but for 1e-36.
__device__ __forceinline__ float activate(Activation act, float x) {
  if (act == Activation::kRelu) return x <= 0.f ? 0.f : x;  // keeps NaN
  if (act == Activation::kSilu) return __fdividef(x, 1.f + exp2_approx(x * -kLog2E));
  return x;
}

// Called by the block: `count` rows of `columns` elements from global to shared memory, `stride`
// elements from one to the next; row(i) is where row i begins, nullptr where there is none. Zeros
// there, and from element `valid` on. `aligned`: rows begin at 16 bytes, and `valid` is a multiple
// of them; the copies are asynchronous then. `legal` is any address of global memory.
template <class T, class Row>
__device__ __forceinline__ void load_rows(T* to, int stride, int count, int columns, int valid,
                                          bool aligned, const T* legal, const Row& row) {
  constexpr int kVector = kWidestVector<T>;
  const int step = aligned ? kVector : 1, across = columns / step;
  for (int i = threadIdx.x; i < count * across; i += blockDim.x) {
    const int r = i / across, column = (i - r * across) * step;
    const T* const from = row(r);
    const bool exists = from != nullptr && column < valid;
    if (aligned) {
      cp_async_16(to + r * stride + column, exists ? from + column : legal, exists);
    } else {
      to[r * stride + column] = exists ? from[column] : from_float<T>(0.f);
    }
  }
}

// c (16 x 8 kTiles) += left (16 x depth) * right (8 kTiles x depth)^T, of tiles [first, end) alone,
// both in shared memory; depth a multiple of 16, first and end even for 16-bit elements.
template <int kTiles, class T>
__device__ __forceinline__ void add_product(float (&c)[kTiles][4], int first, int end,
                                            const T* left, int left_stride, const T* right,
                                            int right_stride, int depth, int lane) {
  if constexpr (sizeof(T) == 2) {
    const T* const a_row = left + (lane & 15) * left_stride + (lane >> 4) * 8;
    const T* const b_row =
        right + ((lane & 7) + ((lane >> 4) << 3)) * right_stride + ((lane >> 3) & 1) * 8;
#pragma unroll 2
    for (int k = 0; k < depth; k += 16) {
      uint32_t a[4];
      ldmatrix_x4(a, a_row + k);
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        if (j < first || j >= end) continue;
        uint32_t b[4];
        ldmatrix_x4(b, b_row + 8 * j * right_stride + k);
        mma_m16n8k16<T>(c[j], a, {b[0], b[1]}, c[j]);
        mma_m16n8k16<T>(c[j + 1], a, {b[2], b[3]}, c[j + 1]);
      }
    }
  } else {
    const auto at = [](const float* p) { return *reinterpret_cast<const float4*>(p); };
    const auto dot = [](float4 x, float4 y, float sum) {
      return fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, sum))));
    };
    const float* const row = left + (lane >> 2) * left_stride;
    const float* const column = right + 2 * (lane & 3) * right_stride;
#pragma unroll 1
    for (int k = 0; k < depth; k += 4) {
      const float4 a0 = at(row + k), a1 = at(row + 8 * left_stride + k);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j < first || j >= end) continue;
        const float4 b0 = at(column + 8 * j * right_stride + k);
        const float4 b1 = at(column + (8 * j + 1) * right_stride + k);
        c[j][0] = dot(a0, b0, c[j][0]);
        c[j][1] = dot(a0, b1, c[j][1]);
        c[j][2] = dot(a1, b0, c[j][2]);
        c[j][3] = dot(a1, b1, c[j][3]);
      }
    }
  }
}

// Starts sums with a bias: channel + 8 j + 2 (lane % 4) and the one after it, as far as there are.
template <int kTiles, class T>
__device__ __forceinline__ void start(float (&c)[kTiles][4], const T* bias, int channel, int count,
                                      int lane) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = channel + 8 * j + 2 * (lane & 3) + i;
      c[j][i] = c[j][2 + i] = own < count ? to_float(bias[own]) : 0.f;
    }
  }
}

// A thread's two channels of a chunk: numbers that a channel has `count` of, from number `first`
// on; zeros where there are no channels.
template <int N, class T>
__device__ __forceinline__ void load_channels(float (&to)[N][2], const T* from, int count,
                                              int first, int channel, int channels) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const T* const own = from + int64_t{channel + e} * count + first;
#pragma unroll
    for (int i = 0; i < N; ++i) to[i][e] = channel + e < channels ? to_float(own[i]) : 0.f;
  }
}

// to = act2(depthwise convolution) of a chunk of the hidden channels, called by the block.
template <int kStride, class T>
__device__ __forceinline__ void convolve(const Problem<T>& op, int chunk, const T* hidden, T* to) {
  constexpr int kPairs = kChunk<T> / 2, kColumns = (kRun - 1) * kStride + 3;
  const int pair = 2 * static_cast<int>(threadIdx.x % kPairs);
  const int runs = op.columns / kRun;
  float bias[1][2];
  load_channels(bias, op.depthwise_bias, 1, 0, chunk + pair, op.hidden);
#pragma unroll 1
  for (int i = threadIdx.x / kPairs; i < op.rows * runs; i += blockDim.x / kPairs) {
    const int row = i / runs, column = (i - row * runs) * kRun;
    const T* from = hidden + (row * op.near_columns + column) * kStride * kChunkStride<T> + pair;
    float sums[kRun][2];
#pragma unroll
    for (int p = 0; p < kRun; ++p) {
      sums[p][0] = bias[0][0];
      sums[p][1] = bias[0][1];
    }
#pragma unroll 1
    for (int y = 0; y < 3; ++y, from += op.near_columns * kChunkStride<T>) {
      float taps[3][2];  // of one row: there are no registers for all
      load_channels(taps, op.depthwise, kBottleneckTaps, 3 * y, chunk + pair, op.hidden);
#pragma unroll
      for (int x = 0; x < kColumns; ++x) {
        const float2 value = load_pair(from + x * kChunkStride<T>);
#pragma unroll
        for (int p = 0; p < kRun; ++p) {
          const int tap = x - p * kStride;
          if (tap < 0 || tap >= 3) continue;
          sums[p][0] = fmaf(value.x, taps[tap][0], sums[p][0]);
          sums[p][1] = fmaf(value.y, taps[tap][1], sums[p][1]);
        }
      }
    }
    T* const own = to + (row * op.columns + column) * kChunkStride<T> + pair;
#pragma unroll
    for (int p = 0; p < kRun; ++p) {
      store_pair(own + p * kChunkStride<T>, activate(op.act2, sums[p][0]),
                 activate(op.act2, sums[p][1]));
    }
  }
}

}  // namespace kernelpose::cuda::bottleneck
