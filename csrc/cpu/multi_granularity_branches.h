// The depthwise convolutions of multi_granularity, forward and backward, for as many channels as a
// vector holds: each lane is a channel, each tap a vector of weights.
#pragma once

#include <algorithm>

#include "kernelpose/multi_granularity.h"
#include "simd.h"
#include "transpose.h"

namespace kernelpose::cpu::KP_ISA {

// Pixels of a row that are computed together, so many sums each.
constexpr int row_pixels(int sums) { return kRegisters == 32 ? 18 / sums : 9 / sums; }

// The vectors of some rows of a map, with a margin of zeros around.
template <class T>
struct Tile {
  static constexpr int n = kWidth<T>;
  T* data;
  int64_t width;  // of the map

  int64_t row() const { return (width + 2 * kLargestMargin) * n; }
  static int64_t size(int64_t rows, int64_t width) {
    return (rows + 2 * kLargestMargin) * (width + 2 * kLargestMargin) * n;
  }
  // Pixel (h, w), either of which may be as little as -kLargestMargin.
  T* at(int64_t h, int64_t w) const {
    return data + (h + kLargestMargin) * row() + (w + kLargestMargin) * n;
  }

  // Rows [first, end) of the map to the tile's rows from `first - origin` on. `from` is at the
  // first of those rows that is on the map, its pixels `stride` apart. Rows off the map become
  // zeros; the margins at the sides stay as they are.
  void fill(const T* from, int64_t stride, int64_t first, int64_t end, int64_t origin,
            int64_t height) const {
    for (int64_t h = first; h < end; ++h) {
      T* const to = at(h - origin, 0);
      if (h < 0 || h >= height) {
        std::fill(to, to + width * n, T(0));
        continue;
      }
      for (int64_t w = 0; w < width; ++w, from += stride) store(to + w * n, load(from));
    }
  }
};

// D of `kPixels` pixels from (h, w) on, of all branches: of branch b at to + b * branch + i *
// stride.
template <class T, int kPixels>
inline void convolve_pixels(const Tile<T>& tile, int64_t h, int64_t w, const T* weights,
                            const T* biases, T* to, int64_t branch, int64_t stride) {
  constexpr int n = kWidth<T>;
  Vector<T> sum[kBranches][kPixels];
#pragma GCC unroll 3
  for (int b = 0; b < kBranches; ++b) {
#pragma GCC unroll 6
    for (int i = 0; i < kPixels; ++i) sum[b][i] = load(biases + b * n);
  }
#pragma GCC unroll 7
  for (int dy = 0; dy < kLargestKernel; ++dy) {
    const T* const from = tile.at(h + dy - kLargestMargin, w - kLargestMargin);
#pragma GCC unroll 7
    for (int dx = 0; dx < kLargestKernel; ++dx) {
      Vector<T> x[kPixels];
#pragma GCC unroll 6
      for (int i = 0; i < kPixels; ++i) x[i] = load(from + (dx + i) * n);
#pragma GCC unroll 3
      for (int b = 0; b < kBranches; ++b) {
        const int side = branch_side(b), y = dy - b, z = dx - b;
        if (y < 0 || y >= side || z < 0 || z >= side) continue;
        const Vector<T> weight = load(weights + (branch_taps(b) + y * side + z) * n);
#pragma GCC unroll 6
        for (int i = 0; i < kPixels; ++i) sum[b][i] += x[i] * weight;
      }
    }
  }
#pragma GCC unroll 3
  for (int b = 0; b < kBranches; ++b) {
#pragma GCC unroll 6
    for (int i = 0; i < kPixels; ++i) store(to + b * branch + i * stride, sum[b][i]);
  }
}

// D of the rows [0, rows) of a tile: of pixel p and branch b at to + p * stride + b * branch.
template <class T>
void convolve(const Tile<T>& tile, int64_t rows, const T* weights, const T* biases, T* to,
              int64_t branch, int64_t stride) {
  constexpr int kPixels = row_pixels(kBranches);
  for (int64_t h = 0; h < rows; ++h) {
    int64_t w = 0;
    for (; w + kPixels <= tile.width; w += kPixels) {
      convolve_pixels<T, kPixels>(tile, h, w, weights, biases, to, branch, stride);
      to += kPixels * stride;
    }
    for (; w < tile.width; ++w, to += stride) {
      convolve_pixels<T, 1>(tile, h, w, weights, biases, to, branch, stride);
    }
  }
}

// The gradient of x that comes through one branch: to (+)= the correlation of its tile of gradients
// with the kernel turned by 180 degrees.
template <class T, int kBranch, int kPixels, bool kAdd>
inline void turn_back_pixels(const Tile<T>& tile, int64_t h, int64_t w, const T* weights, T* to) {
  constexpr int n = kWidth<T>, side = branch_side(kBranch), margin = side / 2;
  Vector<T> sum[kPixels];
#pragma GCC unroll 18
  for (int i = 0; i < kPixels; ++i) sum[i] = kAdd ? load(to + i * n) : Vector<T>{};
  const T* weight = weights + (branch_taps(kBranch + 1) - 1) * n;
  for (int dy = 0; dy < side; ++dy) {
    const T* const from = tile.at(h + dy - margin, w - margin);
#pragma GCC unroll 7
    for (int dx = 0; dx < side; ++dx, weight -= n) {
      const Vector<T> tap = load(weight);
#pragma GCC unroll 18
      for (int i = 0; i < kPixels; ++i) sum[i] += load(from + (dx + i) * n) * tap;
    }
  }
#pragma GCC unroll 18
  for (int i = 0; i < kPixels; ++i) store(to + i * n, sum[i]);
}

// to: a vector a pixel.
template <class T, int kBranch, bool kAdd>
void turn_back(const Tile<T>& tile, int64_t height, const T* weights, T* to) {
  constexpr int n = kWidth<T>, kPixels = row_pixels(kRegisters == 32 ? 3 : 2) * 2;
  for (int64_t h = 0; h < height; ++h) {
    int64_t w = 0;
    for (; w + kPixels <= tile.width; w += kPixels, to += kPixels * n) {
      turn_back_pixels<T, kBranch, kPixels, kAdd>(tile, h, w, weights, to);
    }
    for (; w < tile.width; ++w, to += n) {
      turn_back_pixels<T, kBranch, 1, kAdd>(tile, h, w, weights, to);
    }
  }
}

// Adds to the gradient of one branch's kernel: of each tap the sum over the pixels of the branch's
// gradient times x at that tap, after summing about `pixels` of them.
template <class T, int kBranch>
void correlate(const Tile<T>& x, const Tile<T>& gradient, int64_t height, int64_t pixels,
               T* of_weights) {
  constexpr int n = kWidth<T>, side = branch_side(kBranch), margin = side / 2;
  const int64_t rows = std::max<int64_t>(1, pixels / x.width);
  of_weights += branch_taps(kBranch) * n;
  for (int dy = 0; dy < side; ++dy, of_weights += side * n) {
    for (int64_t top = 0; top < height; top += rows) {
      Vector<T> sum[side] = {};
      for (int64_t h = top; h < std::min(height, top + rows); ++h) {
        const T* const from = x.at(h + dy - margin, -margin);
        const T* const grad = gradient.at(h, 0);
        for (int64_t w = 0; w < x.width; ++w) {
          const Vector<T> g = load(grad + w * n);
#pragma GCC unroll 7
          for (int dx = 0; dx < side; ++dx) sum[dx] += g * load(from + (w + dx) * n);
        }
      }
      for (int dx = 0; dx < side; ++dx) {
        store(of_weights + dx * n, load(of_weights + dx * n) + sum[dx]);
      }
    }
  }
}

}  // namespace kernelpose::cpu::KP_ISA
