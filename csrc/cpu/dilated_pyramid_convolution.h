// One layer of dilated_pyramid on maps in blocks of channels, a vector's or fewer, with margins of
// zeros at the sides.
#pragma once

#include <algorithm>

#include "blocked_map.h"
#include "kernelpose/dilated_pyramid.h"
#include "winograd.h"

namespace kernelpose::cpu::KP_ISA {

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

// A layer from `inputs` channels in blocks of `lanes` to `outputs` in blocks of kWidth: directly,
// or by Winograd's way where that is faster. Its weights are packed group by group of vectors of
// outputs: bias, then weights.
template <class T>
class Convolution {
 public:
  static constexpr int n = kWidth<T>;

  // Of a result of so many rows and columns.
  Convolution(const BlockedMap<T>& from, int64_t outputs, int64_t dilation, int64_t height,
              int64_t width)
      : inputs_(from.channels),
        outputs_(outputs),
        lanes_(from.lanes),
        dilation_(dilation),
        winograd_{from.channels, outputs},
        by_winograd_(from.stride == 1 && from.lanes == n &&
                     Winograd<T>::suits(from.channels, outputs, dilation, height, width)) {}

  int64_t packed_size() const {
    return by_winograd_ ? winograd_.packed_size() : vectors() * (1 + kPyramidTaps * inputs_) * n;
  }
  int64_t scratch_size() const { return by_winograd_ ? winograd_.scratch_size() : 0; }
  int64_t rows_multiple() const { return by_winograd_ ? Winograd<T>::rows_multiple(dilation_) : 1; }

  // weight (outputs, inputs, 3, 3); turned: (inputs, outputs, 3, 3), each kernel turned by 180
  // degrees, for the way back. bias may be nullptr.
  void pack(const T* weight, const T* bias, bool turned, T* to) const {
    for (int64_t v = 0; v < vectors();) {
      const int64_t together = by_winograd_ ? kConvolvedVectors : group(vectors() - v);
      const int64_t first = v * n, row = together * n, real = std::min(row, outputs_ - first);
      T* const begin = to;
      std::fill(to, to + row, T(0));
      if (bias) std::copy(bias + first, bias + first + real, to);
      to += row;
      for (int64_t b = 0; b < inputs_; b += lanes_) {
        const int64_t count = std::min(lanes_, inputs_ - b);
        // (channel, tap, output)
        alignas(kVectorBytes)
            T table[kPyramidTaps * std::max(n, kFewChannels) * kConvolvedVectors * n] = {};
        if (!turned) {
          transpose(weight + (first * inputs_ + b) * kPyramidTaps, real, count * kPyramidTaps,
                    inputs_ * kPyramidTaps, table, row);
        }
        for (int64_t c = 0; turned && c < count; ++c) {
          transpose(weight + ((b + c) * outputs_ + first) * kPyramidTaps, real,
                    int64_t{kPyramidTaps}, int64_t{kPyramidTaps}, table + c * kPyramidTaps * row,
                    row);
        }
        const auto taps = [&](int64_t c, int64_t tap) {
          return table + (c * kPyramidTaps + (turned ? kPyramidTaps - 1 - tap : tap)) * row;
        };
        if (by_winograd_) {
          for (int64_t c = 0; c < count; ++c) {
            const T* of_channel[kPyramidTaps];
            for (int64_t tap = 0; tap < kPyramidTaps; ++tap) of_channel[tap] = taps(c, tap);
            winograd_.transform_weights(of_channel, row, b + c, begin);
          }
          continue;
        }
        for (int64_t tap = 0; tap < kPyramidTaps; ++tap) {
          for (int64_t c = 0; c < count; ++c, to += row) {
            std::copy(taps(c, tap), taps(c, tap) + row, to);
          }
        }
      }
      if (by_winograd_) to = begin + winograd_.group_size();
      v += together;
    }
  }

  // Rows [first, end) of all outputs, `first` at a multiple; written(block, row) is called when a
  // row is there.
  template <class Written>
  void run(const BlockedMap<T>& from, const T* packed, bool relu, const BlockedMap<T>& to,
           int64_t first, int64_t end, T* scratch, const Written& written) const {
    for (int64_t b = 0; b < to.blocks(); ++b) to.clear_margins(b, first, end);
    if (by_winograd_) {
      winograd_.run(from, dilation_, packed, relu, to, first, end, scratch);
      for (int64_t b = 0; b < to.blocks(); ++b) {
        for (int64_t h = first; h < end; ++h) written(b, h);
      }
      return;
    }
    using One = std::integral_constant<int, 1>;
    using Lanes = std::integral_constant<int, n>;
    for (int64_t v = 0; v < vectors();) {
      const int together = group(vectors() - v);
      const PackedWeights<T> weights{packed + together * n, packed};
      for (int64_t h = first; h < end; ++h) {
        const auto row = [&](auto many, auto in) {
          convolve_row<T, decltype(many)::value, decltype(in)::value>(
              from, dilation_, h, to.width, weights, relu, to.at(v, h, 0), to.block());
        };
        if (lanes_ != n) {
          row(One{}, std::integral_constant<int, kFewChannels>{});
        } else if (together == 1) {
          row(One{}, Lanes{});
        } else {
          row(std::integral_constant<int, kConvolvedVectors>{}, Lanes{});
        }
        for (int64_t b = v; b < v + together; ++b) written(b, h);
      }
      v += together;
      packed += (1 + kPyramidTaps * inputs_) * together * n;
    }
  }

 private:
  int64_t vectors() const { return (outputs_ + n - 1) / n; }
  // Vectors that are computed together, out of `left`.
  int group(int64_t left) const {
    return lanes_ != n || left < kConvolvedVectors ? 1 : kConvolvedVectors;
  }

  int64_t inputs_, outputs_, lanes_, dilation_;
  Winograd<T> winograd_;
  bool by_winograd_;
};

// What is computed beyond a map's last pixel reads so many numbers behind it.
template <class T>
int64_t size_to_read(const BlockedMap<T>& map) {
  return round_up(map.size() + map.margin * map.lanes + kPixelSteps * pixel_step(1) * kWidth<T>,
                  kWidth<T>);
}

}  // namespace kernelpose::cpu::KP_ISA
