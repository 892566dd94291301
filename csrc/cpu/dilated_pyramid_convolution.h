// One layer of dilated_pyramid on maps in blocks of channels, a vector's or fewer, with margins of
// zeros at the sides.
#pragma once

#include <algorithm>

#include "kernelpose/dilated_pyramid.h"
#include "simd.h"

namespace kernelpose::cpu::KP_ISA {

// Channels of a pixel that lie together in a map of few channels.
constexpr int kFewChannels = 4;

// A map whose columns lie by their remainder modulo `stride`, so that what neighbouring pixels of a
// convolution with that stride read are neighbours.
template <class T>
struct BlockedMap {
  T* data;
  int64_t channels, height, width;
  int64_t margin;  // columns of zeros at either side
  int64_t stride;
  int64_t lanes;  // channels of a block: kWidth or kFewChannels

  static int64_t lanes_for(int64_t channels) {
    return channels <= kFewChannels ? kFewChannels : kWidth<T>;
  }
  int64_t blocks() const { return (channels + lanes - 1) / lanes; }
  int64_t columns() const { return (width + 2 * margin + stride - 1) / stride; }  // of a remainder
  int64_t row() const { return stride * columns() * lanes; }
  int64_t block() const { return height * row(); }
  int64_t size() const { return blocks() * block(); }
  // Column `column` may be as little as -margin.
  T* at(int64_t which_block, int64_t h, int64_t column) const {
    int64_t c = column + margin;
    if (stride > 1) c = c % stride * columns() + c / stride;
    return data + which_block * block() + h * row() + c * lanes;
  }

  // Makes the margins of some rows of a block zeros.
  void clear_margins(int64_t which_block, int64_t first, int64_t end) const {
    for (int64_t h = first; h < end; ++h) {
      for (int64_t c = 0; c < margin; ++c) {
        for (T* const to : {at(which_block, h, -1 - c), at(which_block, h, width + c)}) {
          std::fill(to, to + lanes, T(0));
        }
      }
    }
  }
};

// Vectors of output channels that are computed together: two halve the reads of the map.
constexpr int kPyramidVectors = kRegisters == 32 ? 2 : 1;
// Pixels that are computed together: up to kPixelSteps times kPixelStep.
constexpr int kPixelSteps = kRegisters == 32 ? 6 : 5;
constexpr int pixel_step(int vectors) { return kRegisters == 32 ? 4 / vectors : 2; }

// The weights of kVectors vectors of channels: (block, tap, channel of it, kVectors, kWidth).
template <class T>
struct PackedWeights {
  const T* data;
  const T* bias;  // (kVectors, kWidth)
};

// kPixels neighbouring pixels of row h from column w on, of which `count` exist, to `to`, whose
// vectors of channels are `to_block` apart.
template <class T, int kPixels, int kVectors, int kLanes>
inline void convolve_pixels(const BlockedMap<T>& from, int64_t dilation, int64_t h, int64_t w,
                            const PackedWeights<T>& weights, bool relu, int64_t count, T* to,
                            int64_t to_block) {
  constexpr int n = kWidth<T>;
  Vector<T> sum[kPixels][kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const Vector<T> bias = load(weights.bias + v * n);
#pragma GCC unroll 24
    for (int p = 0; p < kPixels; ++p) sum[p][v] = bias;
  }
  const T* weight = weights.data;
  for (int64_t b = 0; b < from.blocks(); ++b) {
    const int64_t channels = std::min(from.lanes, from.channels - b * from.lanes);
    for (int64_t ky = 0; ky < kPyramidSide; ++ky) {
      const int64_t y = h * from.stride + (ky - 1) * dilation;
      if (y < 0 || y >= from.height) {
        weight += kPyramidSide * channels * kVectors * n;
        continue;
      }
      for (int64_t kx = 0; kx < kPyramidSide; ++kx) {
        const T* x = from.at(b, y, w * from.stride + (kx - 1) * dilation);
        for (int64_t c = 0; c < channels; ++c, ++x, weight += kVectors * n) {
          Vector<T> tap[kVectors];
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) tap[v] = load(weight + v * n);
#pragma GCC unroll 24
          for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sum[p][v] += x[p * kLanes] * tap[v];
          }
        }
      }
    }
  }
  const Vector<T> zero = {};
#pragma GCC unroll 24
  for (int p = 0; p < kPixels; ++p) {
    if (p >= count) return;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      // In this order NaN stays.
      store(to + v * to_block + p * n, relu ? maximum(zero, sum[p][v]) : sum[p][v]);
    }
  }
}

// A row of kVectors vectors of channels.
template <class T, int kVectors, int kLanes>
void convolve_row(const BlockedMap<T>& from, int64_t dilation, int64_t h, int64_t width,
                  const PackedWeights<T>& weights, bool relu, T* to, int64_t to_block) {
  constexpr int kStep = pixel_step(kVectors);
  const int64_t parts = (width + kPixelSteps * kStep - 1) / (kPixelSteps * kStep);
  const int64_t pixels = round_up((width + parts - 1) / parts, kStep);
  const auto run = [&](auto steps) {
    constexpr int kPixels = decltype(steps)::value * kStep;
    for (int64_t w = 0; w < width; w += kPixels) {
      convolve_pixels<T, kPixels, kVectors, kLanes>(from, dilation, h, w, weights, relu, width - w,
                                                    to + w * kWidth<T>, to_block);
    }
  };
  switch (pixels / kStep) {
    case 1:
      return run(std::integral_constant<int, 1>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    case 3:
      return run(std::integral_constant<int, 3>{});
    case 4:
      return run(std::integral_constant<int, 4>{});
    case 5:
      return run(std::integral_constant<int, 5>{});
    default:
      return run(std::integral_constant<int, kPixelSteps>{});
  }
}

}  // namespace kernelpose::cpu::KP_ISA
