// One layer of the dilated pyramid: an implicit product on tiles of pixels, and for few channels,
// or reaches that no tile holds, a sum for each pixel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "kernelpose/dilated_pyramid.h"
#include "kernelpose/launch.cuh"
#include "kernelpose/vector.cuh"
#include "kernelpose/warp_tile.cuh"

namespace kernelpose::cuda {

// Maps, or some channels of them: elements from one image, pixel, channel to the next.
template <class T>
struct MapView {
  T* data;
  int64_t image, pixel, channel;

  __device__ __forceinline__ T* at(int64_t i, int64_t p, int64_t c) const {
    return data + i * image + p * pixel + c * channel;
  }
};

template <class T>
struct PyramidLayer {
  MapView<const T> in;
  const T* packed;      // (steps of 16 input channels, tap, rounded_outputs, 16)
  const float* weight;  // (outputs, channels, tap)
  const float* bias;
  MapView<T> map;    // f of this layer; data is nullptr where nobody needs it
  MapView<T> total;  // the sum of all maps; data is nullptr but in the last layer
  MapView<const T> first;
  int64_t terms;  // maps before this one, whose channels follow those of `first`
  int64_t batch;
  int channels, outputs, height, width, out_height, out_width, stride, dilation;
  bool relu;
  bool aligned_in, aligned_map, aligned_total;  // for accesses of 16 bytes

  // A value of this layer, from its sum of products.
  __device__ __forceinline__ float finish(float sum, int channel) const {
    const float value = sum + (channel < outputs ? bias[channel] : 0.f);
    return relu && value <= 0.f ? 0.f : value;
  }
  __device__ __forceinline__ float add_terms(float value, int64_t image, int64_t pixel,
                                             int channel) const {
    float sum = 0.f;
    for (int64_t i = 0; i < terms; ++i) {
      sum += to_float(*first.at(image, pixel, i * outputs + channel));
    }
    return sum + value;
  }
};

namespace pyramid {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kColumns = 16;  // of a tile of output pixels; a warp takes whole rows of them
constexpr int kStep = 16;     // input channels in shared memory at a time
constexpr int kFewChannels = 4;
constexpr int kDirectOutputs = 16;  // channels of a pixel that a thread sums

template <class T>
constexpr int kPixelStride = kRowStride<T, kStep>;

// Elements of shared memory.
template <class T>
int64_t tile_pixels(const PyramidLayer<T>& layer, int rows) {
  const int64_t reach = 2 * int64_t{layer.dilation} + 1;
  return ((rows - 1) * int64_t{layer.stride} + reach) *
         ((kColumns - 1) * int64_t{layer.stride} + reach);
}

// c (16 pixels x N) += pixels (16 x 16, `stride` rows apart) * weights (N x 16)^T
template <int M, int N, class T, std::enable_if_t<sizeof(T) == 2, int> = 0>
__device__ __forceinline__ void multiply_tap(float (&c)[M][N / 8][4], const T* pixels, int stride,
                                             int row, const T* weights, int lane) {
  const T* const left = pixels + (lane & 15) * stride + (lane >> 4) * 8;
  const T* const right =
      weights + ((lane & 7) + ((lane >> 4) << 3)) * kPixelStride<T> + ((lane >> 3) & 1) * 8;
  uint32_t b[N / 16][4];
#pragma unroll
  for (int j = 0; j < N / 16; ++j) ldmatrix_x4(b[j], right + 16 * j * kPixelStride<T>);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    uint32_t a[4];
    ldmatrix_x4(a, left + m * row);
#pragma unroll
    for (int j = 0; j < N / 16; ++j) {
      mma_m16n8k16<T>(c[m][2 * j], a, {b[j][0], b[j][1]}, c[m][2 * j]);
      mma_m16n8k16<T>(c[m][2 * j + 1], a, {b[j][2], b[j][3]}, c[m][2 * j + 1]);
    }
  }
}

template <int M, int N>
__device__ __forceinline__ void multiply_tap(float (&c)[M][N / 8][4], const float* pixels,
                                             int stride, int row, const float* weights, int lane) {
  const auto at = [](const float* p) { return *reinterpret_cast<const float4*>(p); };
  const auto dot = [](float4 x, float4 y, float sum) {
    return fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, sum))));
  };
  const float* const left = pixels + (lane >> 2) * stride;
  const float* const right = weights + 2 * (lane & 3) * kPixelStride<float>;
#pragma unroll
  for (int k = 0; k < kStep; k += 4) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float4 b0 = at(right + 8 * j * kPixelStride<float> + k);
      const float4 b1 = at(right + (8 * j + 1) * kPixelStride<float> + k);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const float4 a0 = at(left + m * row + k), a1 = at(left + m * row + 8 * stride + k);
        c[m][j][0] = dot(a0, b0, c[m][j][0]);
        c[m][j][1] = dot(a0, b1, c[m][j][1]);
        c[m][j][2] = dot(a1, b0, c[m][j][2]);
        c[m][j][3] = dot(a1, b1, c[m][j][3]);
      }
    }
  }
}

// Rows [0, rows) and columns [0, columns) from input pixel (top, left) on, kStep channels from
// `step` on, to shared memory, pixel by pixel; zeros where there is nothing.
template <class T>
__device__ __forceinline__ void load_tile(const PyramidLayer<T>& layer, int64_t image, int top,
                                          int left, int rows, int columns, int step, T* tile) {
  constexpr int kVector = kWidestVector<T>, kVectors = kStep / kVector;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* const base = layer.in.at(image, 0, 0);
  const bool last = layer.in.channel == 1;
  for (int r = warp; r < rows; r += kWarps) {
    const int y = top + r;
    const bool row_exists = y >= 0 && y < layer.height;
    const T* const from = base + (row_exists ? int64_t{y} * layer.width * layer.in.pixel : 0);
    T* const to = tile + r * columns * kPixelStride<T>;
    if (layer.aligned_in) {
      for (int i = lane; i < columns * kVectors; i += 32) {
        const int column = i / kVectors, channel = i % kVectors * kVector, x = left + column;
        const bool exists =
            row_exists && x >= 0 && x < layer.width && step + channel < layer.channels;
        cp_async_16(to + column * kPixelStride<T> + channel,
                    exists ? from + x * layer.in.pixel + step + channel : base, exists);
      }
    } else if (last) {
      for (int i = lane; i < columns * kStep; i += 32) {
        const int column = i / kStep, channel = i % kStep, x = left + column;
        const bool exists =
            row_exists && x >= 0 && x < layer.width && step + channel < layer.channels;
        to[column * kPixelStride<T> + channel] =
            exists ? from[x * layer.in.pixel + step + channel] : from_float<T>(0.f);
      }
    } else {  // the pixels of a channel are neighbours
      for (int column = lane; column < columns; column += 32) {
        const int x = left + column;
        const bool inside = row_exists && x >= 0 && x < layer.width;
#pragma unroll
        for (int channel = 0; channel < kStep; channel += 2) {
          ElementVector<T, 2> pair;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const bool exists = inside && step + channel + i < layer.channels;
            pair.values[i] =
                exists ? from[(step + channel + i) * layer.in.channel + x] : from_float<T>(0.f);
          }
          store_vector(to + column * kPixelStride<T> + channel, pair);
        }
      }
    }
  }
}

// All taps of N output channels and kStep input channels to shared memory: (tap, N, kStep).
template <int N, class T>
__device__ __forceinline__ void load_weights(const T* packed, int rounded_outputs, T* weights) {
  constexpr int kVector = kWidestVector<T>, kVectors = kStep / kVector;
  for (int i = threadIdx.x; i < kPyramidTaps * N * kVectors; i += kThreads) {
    const int row = i / kVectors, column = i % kVectors * kVector;
    const int tap = row / N, output = row % N;
    cp_async_16(weights + row * kPixelStride<T> + column,
                packed + (int64_t{tap} * rounded_outputs + output) * kStep + column, true);
  }
}

// 16 pixels of a row, `count` of which exist, by N channels, `channels` of which exist, through 16
// rows of shared memory of this warp, or N of them where the pixels of a channel are neighbours.
template <int N, class T>
__device__ __forceinline__ void store_pixels(const float (&c)[N / 8][4], const MapView<T>& view,
                                             T* to, int count, int channels, bool aligned,
                                             T* staging, int lane) {
  if (view.channel == 1) {
    const int row = lane & 15;
    T* const target = row < count ? to + row * view.pixel : nullptr;
    return store_rows<T, N>(c, {1.f, 1.f}, staging, target, lane, channels, aligned);
  }
  constexpr int kVector = kWidestVector<T>, kVectors = kColumns / kVector;
  __syncwarp();  // whatever the warp read from staging
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int channel = 8 * j + 2 * (lane & 3) + (i & 1), pixel = (lane >> 2) + 8 * (i >> 1);
      staging[channel * kPixelStride<T> + pixel] = from_float<T>(c[j][i]);
    }
  }
  __syncwarp();
  for (int i = lane; i < N * kVectors; i += 32) {
    const int channel = i / kVectors, pixel = i % kVectors * kVector;
    if (channel >= channels) break;
    const T* const from = staging + channel * kPixelStride<T> + pixel;
    T* const target = to + channel * view.channel + pixel;
    if (aligned && pixel + kVector <= count) {
      store_vector(target, load_vector<kVector>(from));
    } else {
      for (int e = 0; e < kVector && pixel + e < count; ++e) target[e] = from[e];
    }
  }
}

template <int N, class T>
constexpr int kStaging = N == 32 ? 32 * kPixelStride<T> : 16 * kRowStride<T, N>;  // of a warp

// Output pixels: 4 M rows of 16. Each warp takes M rows. Blocks: (tiles of all images, N channels).
template <class T, int M, int N>
__global__ void __launch_bounds__(kThreads, M == 1                 ? 5
                                            : sizeof(T) * N == 128 ? 2
                                                                   : 3)
    dilated_pyramid_tile_kernel(const PyramidLayer<T> layer) {
  KP_DYNAMIC_SHARED(uint4, memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int across = (layer.out_width + kColumns - 1) / kColumns;
  const int down = (layer.out_height + kWarps * M - 1) / (kWarps * M);
  const int64_t image = blockIdx.x / (across * down);
  const int which = blockIdx.x % (across * down);
  const int top = which / across * kWarps * M, left = which % across * kColumns;
  const int output = blockIdx.y * N, stride = layer.stride, dilation = layer.dilation;
  const int rounded_outputs = gridDim.y * N;
  const int rows = (kWarps * M - 1) * stride + 2 * dilation + 1;
  const int columns = (kColumns - 1) * stride + 2 * dilation + 1;
  T* const weights = reinterpret_cast<T*>(memory);
  T* const tile = weights + kPyramidTaps * N * kPixelStride<T>;
  const T* packed = layer.packed + output * kStep;

  float c[M][N / 8][4] = {};
  for (int step = 0; step < layer.channels; step += kStep) {
    if (step > 0) __syncthreads();  // every warp is done with the tile and the weights
    load_tile(layer, image, top * stride - dilation, left * stride - dilation, rows, columns, step,
              tile);
    load_weights<N>(packed, rounded_outputs, weights);
    packed += int64_t{kPyramidTaps} * rounded_outputs * kStep;
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const T* const own = tile + warp * M * stride * columns * kPixelStride<T>;
#pragma unroll(sizeof(T) == 2 ? kPyramidTaps : 1)
    for (int tap = 0; tap < kPyramidTaps; ++tap) {
      const int y = tap / kPyramidSide * dilation, x = tap % kPyramidSide * dilation;
      multiply_tap<M, N>(c, own + (y * columns + x) * kPixelStride<T>, stride * kPixelStride<T>,
                         stride * columns * kPixelStride<T>, weights + tap * N * kPixelStride<T>,
                         lane);
    }
  }

  __syncthreads();  // every warp is done with what staging lies on
  T* const staging = weights + warp * kStaging<N, T>;
  const int channels = min(N, layer.outputs - output);
  const int count = min(kColumns, layer.out_width - left);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const int row = top + warp * M + m;
    if (row >= layer.out_height) break;
    const int64_t pixel = int64_t{row} * layer.out_width + left;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        c[m][j][i] = layer.finish(c[m][j][i], output + 8 * j + 2 * (lane & 3) + (i & 1));
      }
    }
    if (layer.map.data != nullptr) {
      store_pixels<N>(c[m], layer.map, layer.map.at(image, pixel, output), count, channels,
                      layer.aligned_map, staging, lane);
    }
    if (layer.total.data == nullptr) continue;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = 8 * j + 2 * (lane & 3) + (i & 1), x = (lane >> 2) + 8 * (i >> 1);
        if (channel < channels && x < count) {
          c[m][j][i] = layer.add_terms(c[m][j][i], image, pixel + x, output + channel);
        }
      }
    }
    store_pixels<N>(c[m], layer.total, layer.total.at(image, pixel, output), count, channels,
                    layer.aligned_total, staging, lane);
  }
}

// kDirectOutputs channels of one output pixel a thread. Blocks: (kThreads pixels of an image,
// channels).
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    dilated_pyramid_direct_kernel(const PyramidLayer<T> layer) {
  KP_DYNAMIC_SHARED(float, weights);  // (kFewChannels, tap, kDirectOutputs)
  const int pixels = layer.out_height * layer.out_width;
  const int blocks = (pixels - 1) / kThreads + 1;
  const int64_t image = blockIdx.x / blocks;
  const int64_t pixel = int64_t{blockIdx.x % blocks} * kThreads + threadIdx.x;
  const int h = static_cast<int>(pixel) / layer.out_width;
  const int w = static_cast<int>(pixel) % layer.out_width;
  const int output = blockIdx.y * kDirectOutputs;
  const bool own = pixel < pixels;

  float sum[kDirectOutputs] = {};
  for (int step = 0; step < layer.channels; step += kFewChannels) {
    const int count = min(kFewChannels, layer.channels - step);
    if (step > 0) __syncthreads();  // every thread is done with the weights
    for (int i = threadIdx.x; i < count * kPyramidTaps * kDirectOutputs; i += kThreads) {
      const int which = i % kDirectOutputs, of_input = i / kDirectOutputs;
      const int64_t row = int64_t{output + which} * layer.channels + step;
      weights[i] = output + which < layer.outputs
                       ? to_float(from_float<T>(layer.weight[row * kPyramidTaps + of_input]))
                       : 0.f;
    }
    __syncthreads();
    if (!own) continue;
    for (int channel = 0; channel < count; ++channel) {
#pragma unroll
      for (int tap = 0; tap < kPyramidTaps; ++tap) {
        const int64_t y = int64_t{h} * layer.stride + (tap / kPyramidSide - 1) * layer.dilation;
        const int64_t x = int64_t{w} * layer.stride + (tap % kPyramidSide - 1) * layer.dilation;
        if (y < 0 || y >= layer.height || x < 0 || x >= layer.width) continue;
        const float value = to_float(*layer.in.at(image, y * layer.width + x, step + channel));
        const float* const taps = weights + (channel * kPyramidTaps + tap) * kDirectOutputs;
#pragma unroll
        for (int o = 0; o < kDirectOutputs; o += 4) {
          const float4 four = *reinterpret_cast<const float4*>(taps + o);
          sum[o] = fmaf(value, four.x, sum[o]);
          sum[o + 1] = fmaf(value, four.y, sum[o + 1]);
          sum[o + 2] = fmaf(value, four.z, sum[o + 2]);
          sum[o + 3] = fmaf(value, four.w, sum[o + 3]);
        }
      }
    }
  }
  if (!own) return;
  const int channels = min(kDirectOutputs, layer.outputs - output);
  constexpr int kVector = kWidestVector<T>;
  const auto store = [&](const MapView<T>& view, bool aligned) {
    T* const to = view.at(image, pixel, output);
    if (aligned && view.channel == 1 && channels == kDirectOutputs) {
#pragma unroll
      for (int o = 0; o < kDirectOutputs; o += kVector) {
        ElementVector<T, kVector> vector;
#pragma unroll
        for (int e = 0; e < kVector; ++e) vector.values[e] = from_float<T>(sum[o + e]);
        store_vector(to + o, vector);
      }
    } else {
#pragma unroll
      for (int o = 0; o < kDirectOutputs; ++o) {
        if (o < channels) to[o * view.channel] = from_float<T>(sum[o]);
      }
    }
  };
#pragma unroll
  for (int o = 0; o < kDirectOutputs; ++o) sum[o] = layer.finish(sum[o], output + o);
  if (layer.map.data != nullptr) store(layer.map, layer.aligned_map);
  if (layer.total.data == nullptr) return;
#pragma unroll
  for (int o = 0; o < kDirectOutputs; ++o) {
    if (o < channels) sum[o] = layer.add_terms(sum[o], image, pixel, output + o);
  }
  store(layer.total, layer.aligned_total);
}

}  // namespace pyramid
}  // namespace kernelpose::cuda
