// Products of matrices that lie in shared memory in either order, by one warp: on tensor cores for
// 16-bit elements, by float32 FMA for float. Accumulators lie as in warp_tile.cuh.
#pragma once

#include "kernelpose/warp_tile.cuh"

namespace kernelpose {

// A matrix of `stride` elements from one line to the next; each starts at 16 bytes. Of the left
// factor (m, k) the lines are its rows m, of the right factor (k, n) its columns n, so that
// neighbours follow each other along k; kTurned: the lines are those of k.
template <class T, bool kTurned>
struct Lines {
  const T* data;
  int stride;

  __device__ __forceinline__ T at(int i, int k) const {
    return kTurned ? data[k * stride + i] : data[i * stride + k];
  }
};

// c (16 x 8 kTiles) += left (16 x depth) * right (depth x 8 kTiles). depth is a multiple of 16,
// kTiles of 2.
template <int kTiles, bool kLeftTurned, bool kRightTurned, class T,
          std::enable_if_t<sizeof(T) == 2, int> = 0>
__device__ __forceinline__ void warp_product(float (&c)[kTiles][4], Lines<T, kLeftTurned> left,
                                             Lines<T, kRightTurned> right, int depth, int lane) {
  // Which line and which place in it a lane names: either the second matrix of a quadruple is 8
  // lines further, or the third.
  const int near = lane & 15, far = (lane >> 4) * 8;
  const int line = (lane & 7) + far, place = (lane >> 3 & 1) * 8;
  const T* a_row =
      left.data + (kLeftTurned ? line * left.stride + place : near * left.stride + far);
  const T* b_row =
      right.data + (kRightTurned ? near * right.stride + far : line * right.stride + place);
  for (int k = 0; k < depth; k += 16) {
    uint32_t a[4];
    if (kLeftTurned) {
      ldmatrix_x4_trans(a, a_row + k * left.stride);
    } else {
      ldmatrix_x4(a, a_row + k);
    }
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t b[4];
      if (kRightTurned) {
        ldmatrix_x4_trans(b, b_row + k * right.stride + 8 * j);
      } else {
        ldmatrix_x4(b, b_row + 8 * j * right.stride + k);
      }
      mma_m16n8k16<T>(c[j], a, {b[0], b[1]}, c[j]);
      mma_m16n8k16<T>(c[j + 1], a, {b[2], b[3]}, c[j + 1]);
    }
  }
}

// Any depth. The left factor may lie anywhere and have no more than `rows` rows.
template <int kTiles, bool kLeftTurned, bool kRightTurned>
__device__ __forceinline__ void warp_product(float (&c)[kTiles][4], Lines<float, kLeftTurned> left,
                                             int rows, Lines<float, kRightTurned> right, int depth,
                                             int lane) {
  const int row = lane >> 2, column = 2 * (lane & 3), last = rows - 1;
#pragma unroll 4
  for (int k = 0; k < depth; ++k) {
    const float a0 = left.at(min(row, last), k), a1 = left.at(min(row + 8, last), k);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float2 b;
      if (kRightTurned) {
        b = *reinterpret_cast<const float2*>(right.data + k * right.stride + 8 * j + column);
      } else {
        b = make_float2(right.at(8 * j + column, k), right.at(8 * j + column + 1, k));
      }
      c[j][0] = fmaf(a0, b.x, c[j][0]);
      c[j][1] = fmaf(a0, b.y, c[j][1]);
      c[j][2] = fmaf(a1, b.x, c[j][2]);
      c[j][3] = fmaf(a1, b.y, c[j][3]);
    }
  }
}

}  // namespace kernelpose
