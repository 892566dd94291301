// 3x3 convolutions with stride 1 by Winograd's F(2x2, 3x3) ("Fast Algorithms for Convolutional
// Neural Networks", Lavin and Gray, 2016): of 2 x 2 outputs from 4 x 4 inputs, both a dilation
// apart, by 16 products of matrices over the channels in place of 36.
#pragma once

#include <algorithm>

#include "blocked_map.h"

namespace kernelpose::cpu::KP_ISA {

// Vectors of output channels that are computed together: two halve the reads of the map.
constexpr int kConvolvedVectors = kRegisters == 32 ? 2 : 1;

template <class T>
class Winograd {
 public:
  static constexpr int n = kWidth<T>;
  static constexpr int kVectors = kConvolvedVectors, kOutputs = kVectors * n;
  static constexpr int kPositions = 16;
  static constexpr int kTogether = kRegisters == 32 ? 12 : 10;  // tiles, their sums in registers
  static constexpr int kTiles = 2 * kTogether;  // whose transforms stay near the first level
  static constexpr int kAhead = 64;             // channels: large weights come from far

  int64_t inputs, outputs;
  // Parts of the channels that are convolved each for itself, of whole vectors of inputs and whole
  // kOutputs. The four inner positions, which alone the middle tap of a kernel reaches, take all
  // inputs: a 1x1 convolution of all channels costs nothing else.
  int64_t parts = 1;

  static bool suits(int64_t inputs, int64_t outputs, int64_t dilation, int64_t height,
                    int64_t width) {
    if (inputs < 32 || outputs < 32) return false;  // the transforms would take longer
    // A tile has 4 pixels where it lies within the map.
    return 3 * starts(height, dilation) * starts(width, dilation) <= height * width;
  }
  // Rows in multiples of which the map may be divided.
  static int64_t rows_multiple(int64_t dilation) { return 2 * dilation; }

  int64_t groups() const { return (outputs + kOutputs - 1) / kOutputs; }
  int64_t packed_size() const { return groups() * group_size(); }
  int64_t scratch_size() const { return kPositions * kTiles * (round_up(inputs, n) + kOutputs); }

  // The weights of all taps of one channel for kOutputs outputs, `row` numbers of which are given,
  // to their places of each position.
  void transform_weights(const T* const (&taps)[9], int64_t row, int64_t channel, T* group) const {
    T* const to = group + kOutputs + channel * kOutputs;
    for (int64_t v = 0; v < row; v += n) {
      Vector<T> half[4][3];
#pragma GCC unroll 3
      for (int x = 0; x < 3; ++x) {
        const Vector<T> a = load(taps[x] + v), b = load(taps[3 + x] + v), c = load(taps[6 + x] + v);
        half[0][x] = a;
        half[1][x] = (a + b + c) * T(0.5);
        half[2][x] = (a - b + c) * T(0.5);
        half[3][x] = c;
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const auto [a, b, c] = half[i];
        T* const place = to + 4 * i * inputs * kOutputs + v;
        store(place, a);
        store(place + inputs * kOutputs, (a + b + c) * T(0.5));
        store(place + 2 * inputs * kOutputs, (a - b + c) * T(0.5));
        store(place + 3 * inputs * kOutputs, c);
      }
    }
  }
  int64_t group_size() const { return kOutputs + (12 * (inputs / parts) + 4 * inputs) * kOutputs; }

  // Rows [first, end), which begin, and end but for the map's end, at multiples. packed: for each
  // group of kOutputs its bias, and the weights (inputs, kOutputs) of each position.
  template <class ToMap>
  void run(const BlockedMap<T>& from, int64_t dilation, const T* packed, bool relu, const ToMap& to,
           int64_t first, int64_t end, T* scratch) const {
    Tiles tiles = {};
    for (int64_t h = first; h < end; ++h) {
      if (h / dilation % 2 == 1) continue;
      for (int64_t w = 0; w < to.width; ++w) {
        if (w / dilation % 2 == 1) continue;
        tiles.h[tiles.count] = h;
        tiles.w[tiles.count] = w;
        if (++tiles.count < kTiles) continue;
        run_tiles(from, dilation, packed, relu, to, tiles, scratch);
        tiles.count = 0;
      }
    }
    if (tiles.count > 0) run_tiles(from, dilation, packed, relu, to, tiles, scratch);
  }

 private:
  struct Tiles {
    int64_t h[kTiles], w[kTiles];  // of the first output
    int64_t count;
  };

  // Tiles along a side.
  static int64_t starts(int64_t size, int64_t dilation) {
    const int64_t pairs = size / (2 * dilation);
    return pairs * dilation + std::min(dilation, size - pairs * 2 * dilation);
  }

  template <class ToMap>
  void run_tiles(const BlockedMap<T>& from, int64_t dilation, const T* packed, bool relu,
                 const ToMap& to, const Tiles& tiles, T* scratch) const {
    T* const products = scratch + kPositions * kTiles * round_up(inputs, n);
    for (int64_t b = 0; b < from.blocks(); ++b) {
      for (int64_t t = 0; t < tiles.count; ++t) {
        transform(from, b, tiles.h[t], tiles.w[t], dilation, scratch + (b * kTiles + t) * n);
      }
    }
    const int64_t own = inputs / parts;
    for (int64_t g = 0; g < groups(); ++g, packed += group_size()) {
      const int64_t part = g * kOutputs / (outputs / parts);
      const T* weight = packed + kOutputs;
      for (int64_t position = 0; position < kPositions; ++position) {
        const bool inner = position / 4 % 3 != 0 && position % 4 % 3 != 0;
        const int64_t count = inner ? inputs : own;
        const T* const place =
            scratch + (position * from.blocks() + (inner ? 0 : part * own / n)) * kTiles * n;
        for (int64_t t = 0; t < tiles.count; t += kTogether) {
          multiply(place + t * n, count, weight, products + (position * kTiles + t) * kOutputs);
        }
        weight += count * kOutputs;
      }
      for (int64_t v = 0; v < std::min<int64_t>(kVectors, to.blocks() - g * kVectors); ++v) {
        for (int64_t t = 0; t < tiles.count; ++t) {
          transform_back(products + t * kOutputs + v * n, load(packed + v * n), relu, to,
                         g * kVectors + v, tiles.h[t], tiles.w[t], dilation);
        }
      }
    }
  }

  // A block of a tile's channels to their places of each position.
  void transform(const BlockedMap<T>& from, int64_t block, int64_t h, int64_t w, int64_t dilation,
                 T* place) const {
    Vector<T> x[4][4], half[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int64_t y = h + (i - 1) * dilation;
      const bool exists = y >= 0 && y < from.height;
      // Columns beyond the margin are any numbers: they count for outputs beyond the map alone.
      const T* const row = from.at(block, exists ? y : 0, w - dilation);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) x[i][j] = exists ? load(row + j * dilation * n) : Vector<T>{};
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      half[0][j] = x[0][j] - x[2][j];
      half[1][j] = x[1][j] + x[2][j];
      half[2][j] = x[2][j] - x[1][j];
      half[3][j] = x[1][j] - x[3][j];
    }
    const int64_t next = from.blocks() * kTiles * n;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, place += 4 * next) {
      store(place, half[i][0] - half[i][2]);
      store(place + next, half[i][1] + half[i][2]);
      store(place + 2 * next, half[i][2] - half[i][1]);
      store(place + 3 * next, half[i][1] - half[i][3]);
    }
  }

  // kTogether tiles of so many channels times the weights of one position.
  void multiply(const T* tiles, int64_t channels, const T* weight, T* to) const {
    Vector<T> sum[kTogether][kVectors] = {};
    for (int64_t first = 0; first < channels; first += n, tiles += kTiles * n) {
      const int64_t count = std::min<int64_t>(n, channels - first);
      for (int64_t c = 0; c < count; ++c, weight += kOutputs) {
        Vector<T> outputs[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          outputs[v] = load(weight + v * n);
          __builtin_prefetch(weight + kAhead * kOutputs + v * n);
        }
#pragma GCC unroll 12
        for (int t = 0; t < kTogether; ++t) {
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sum[t][v] += tiles[t * n + c] * outputs[v];
        }
      }
    }
#pragma GCC unroll 12
    for (int t = 0; t < kTogether; ++t) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store(to + t * kOutputs + v * n, sum[t][v]);
    }
  }

  template <class ToMap>
  void transform_back(const T* products, Vector<T> bias, bool relu, const ToMap& to, int64_t block,
                      int64_t h, int64_t w, int64_t dilation) const {
    constexpr int64_t kNext = kTiles * kOutputs;
    Vector<T> half[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const T* const column = products + j * kNext;
      const Vector<T> a = load(column), b = load(column + 4 * kNext), c = load(column + 8 * kNext),
                      d = load(column + 12 * kNext);
      half[0][j] = a + b + c;
      half[1][j] = b - c - d;
    }
    const Vector<T> zero = {};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Vector<T> left = half[i][0] + half[i][1] + half[i][2] + bias;
      const Vector<T> right = half[i][1] - half[i][2] - half[i][3] + bias;
      if (h + i * dilation >= to.height) break;
      // In this order NaN stays.
      store(to.at(block, h + i * dilation, w), relu ? maximum(zero, left) : left);
      if (w + dilation < to.width) {
        store(to.at(block, h + i * dilation, w + dilation), relu ? maximum(zero, right) : right);
      }
    }
  }
};

}  // namespace kernelpose::cpu::KP_ISA
