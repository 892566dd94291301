// A chain of 3x3 convolutions, each with a dilation of its own and zeros around:
// f_i = act(w_i * f_{i-1} + b_i) with f_0 = x, the first with a stride. What comes out is either
// all of them, one after the other along the channels, or their sum.
#pragma once

#include <cstdint>
#include <vector>

namespace kernelpose {

constexpr int kPyramidSide = 3;  // of every kernel
constexpr int kPyramidTaps = kPyramidSide * kPyramidSide;

struct DilatedPyramidLayer {
  const void* weight;  // (channels, channels of the layer before, 3, 3)
  const void* bias;    // (channels)
  int64_t channels, dilation;
};

struct DilatedPyramidShape {
  int64_t batch, channels, height, width;  // of x
  bool channels_last;                      // of x and of all maps
  int64_t stride;                          // of the first layer
  bool relu;
  bool sum;  // f_1 + ... + f_n, all of one width, or else their concatenation

  int64_t out_height() const { return (height - 1) / stride + 1; }
  int64_t out_width() const { return (width - 1) / stride + 1; }
  int64_t out_pixels() const { return out_height() * out_width(); }
};

using DilatedPyramidLayers = std::vector<DilatedPyramidLayer>;

// Channels of f_1, ..., f_n together.
inline int64_t pyramid_channels(const DilatedPyramidLayers& layers) {
  int64_t sum = 0;
  for (const DilatedPyramidLayer& layer : layers) sum += layer.channels;
  return sum;
}

}  // namespace kernelpose
