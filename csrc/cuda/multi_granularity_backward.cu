// Backward: two kernels over tiles of 8 x 12 pixels (multi_granularity_tiles.cuh), a block for 16
// channels at a time, and one that adds what the blocks have summed.
//
//   mix   x -> branches again (48 x 96); grad_out * branches^T -> gradient of mix_weight
//         mix_weight^T * grad_out -> gradients of the branches, to the workspace in T
//   taps  those and x with their margins -> gradients of x, of the kernels and of their biases
//
// A block adds a tile's sums to those of its earlier tiles, the last kernel adds the blocks': no
// sum is long, and none depends on timing.
//
// Floor: x and grad_out read and grad_x written, at 64 maps of 768 x 16 x 12 in half 57 MB, 19 us
// of an H100's memory; the branches' gradients, written and read, another 113 MB, as they do not
// fit its L2; 3 x 83 products a channel and pixel that no tensor core takes, 81 us of its FMA
// units. Shared memory: 50 KB a block of mix at groups of 48 channels in half, 47 KB of taps.
//
// budget: mix_gradient_kernel<*> registers<=128
// budget: tap_gradient_kernel<*> registers<=128
// budget: add_parts_kernel registers<=40
#include <algorithm>

#include "kernelpose/channel_passes.cuh"
#include "kernelpose/warp_product.cuh"
#include "multi_granularity.h"
#include "multi_granularity_tiles.cuh"

namespace kernelpose::cuda {

using namespace granularity;

namespace {

constexpr int kRows = 8, kPixels = kRows * kTileColumns;
constexpr int kChannels = 16;  // of a block
constexpr int kThreads = kRows * kChannels, kWarps = kThreads / 32, kBlocks = 4;
constexpr int kStride = kPixels + 8;           // an odd multiple of 16 bytes
constexpr int kMixed = kBranches * kChannels;  // branches of a block
constexpr int kMixStride = kMixed + 8;

// Where the parameters' gradients lie in what a part sums.
struct PartSums {
  int64_t weights[kBranches], biases[kBranches], mix_weight, mix_bias, size;

  KP_HOST_DEVICE PartSums(int64_t channels, int64_t group) : size(0) {
    for (int b = 0; b < kBranches; ++b)
      take(weights[b], channels * branch_side(b) * branch_side(b));
    for (int b = 0; b < kBranches; ++b) take(biases[b], channels);
    take(mix_weight, channels * kBranches * group);
    take(mix_bias, channels);
  }
  KP_HOST_DEVICE void take(int64_t& begin, int64_t count) {
    begin = size;
    size += count;
  }
};

template <class T>
struct BackwardArguments {
  const T* grad_out;
  const T* x;
  T* grad_x;
  MultiGranularityWeights parameters;
  T* branches;   // (batch, 3, channels, pixels): their gradients
  float* parts;  // (parts, PartSums)
  TiledMaps maps, branch_maps;
  int groups, group, padded;
};

template <class T>
struct MixShared {
  T *branches, *grads, *planes, *mix;
  float *taps, *sums;

  // branches (48, kStride), grads (padded, kStride), planes of 16 channels, mix (padded,
  // kMixStride); sums (padded, kMixStride).
  template <class Take>
  KP_HOST_DEVICE constexpr void lay(int padded, Take& take) {
    take(branches, kMixed * kStride);
    take(grads, padded * kStride);
    take(planes, plane_at<T, kRows>(kChannels));
    take(mix, sizeof(T) == 2 ? padded * kMixStride : 0);
    take(taps, kChannels * kTapSpace);
    take(sums, padded * kMixStride);
  }
};

template <class T>
struct TapShared {
  T *branches, *planes;  // planes of 3 and of one times 16 channels
  float *taps, *sums;    // sums (16, kSums)
  static constexpr int kSums = kPixels + 9;

  template <class Take>
  KP_HOST_DEVICE constexpr void lay(int, Take& take) {
    take(branches, plane_at<T, kRows>(kMixed));
    take(planes, plane_at<T, kRows>(kChannels));
    take(taps, kChannels * kTapSpace);
    take(sums, kChannels * kSums);
  }
};

// Lays one array after the other.
struct Place {
  unsigned char* memory;

  template <class P>
  KP_HOST_DEVICE void operator()(P*& array, int count) {
    array = reinterpret_cast<P*>(memory);
    memory += bytes_of<P>(count);
  }
};

struct Measure {
  int bytes = 0;

  template <class P>
  KP_HOST_DEVICE constexpr void operator()(P*&, int count) {
    bytes += bytes_of<P>(count);
  }
};

template <class Shared>
constexpr int shared_bytes(int padded) {
  Shared shared = {};
  Measure measure;
  shared.lay(padded, measure);
  return measure.bytes;
}

static_assert(shared_bytes<MixShared<float>>(kMaxGroupChannels) <= kSharedLimit);
static_assert(shared_bytes<MixShared<__half>>(kMaxGroupChannels) <= kSharedLimit);
static_assert(shared_bytes<TapShared<float>>(0) <= kSharedLimit);
static_assert(shared_bytes<TapShared<__half>>(0) <= kSharedLimit);

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    mix_gradient_kernel(const BackwardArguments<T> args) {
  KP_DYNAMIC_SHARED(unsigned char, memory);
  const int n = args.group, padded = args.padded, turns = padded / kChannels;
  MixShared<T> shared;
  Place place{memory};
  shared.lay(padded, place);

  const TiledMaps& maps = args.maps;
  const MultiGranularityWeights& p = args.parameters;
  const int block = blockIdx.x % (args.groups * turns), part = blockIdx.x / (args.groups * turns);
  const int parts = gridDim.x / (args.groups * turns);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = block / turns * n, begin = block % turns * kChannels;
  const int first = group + begin, count = min(n - begin, kChannels);
  const float* const mix_weight = p.mix_weight + int64_t{group} * kBranches * n + begin;
  if constexpr (sizeof(T) == 2) {
    for (int i = threadIdx.x; i < padded * kMixed; i += kThreads) {
      const int row = i / kMixed, b = i % kMixed / kChannels, c = i % kChannels;
      const bool exists = row < n && c < count;
      shared.mix[row * kMixStride + i % kMixed] =
          from_float<T>(exists ? mix_weight[(row * kBranches + b) * n + c] : 0.f);
    }
  }
  for (int i = threadIdx.x; i < padded * kMixStride; i += kThreads) shared.sums[i] = 0.f;
  read_taps(p.weights, first, count, kChannels, shared.taps);
  float of_bias = 0.f;

  const RowOfTile<kRows> own;
  for (int64_t which = part; which < maps.count; which += parts) {
    const PixelTile tile(maps, which);
    const int64_t image = tile.image * maps.image();
    read_tile<kRows>(maps, args.x + image, tile, first, count, kChannels, shared.planes);
    read_planes<kRows, kTileColumns>(
        maps, args.grad_out + image, group, n, padded, tile.top, tile.left, shared.grads,
        [](int c) { return c * kStride; }, kTileColumns);
    __syncthreads();
    convolve<kRows>(own, shared.planes, shared.taps, p.biases, first + own.channel,
                    own.channel < count, shared.branches + own.channel * kStride,
                    kChannels * kStride);
    __syncthreads();
    for (int unit = warp; unit < turns * kBranches; unit += kWarps) {
      const int row = unit / kBranches * 16, column = unit % kBranches * kChannels;
      const Lines<T, false> left{shared.grads + row * kStride, kStride};
      const Lines<T, false> right{shared.branches + column * kStride, kStride};
      float c[2][4] = {};
      if constexpr (sizeof(T) == 2) {
        warp_product(c, left, right, kPixels, lane);
      } else {
        warp_product(c, left, 16, right, kPixels, lane);
      }
      float* const to = shared.sums + (row + lane / 4) * kMixStride + column + 2 * (lane % 4);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i / 2 * 8 * kMixStride + 8 * j + i % 2] += c[j][i];
      }
    }
    if (begin == 0 && threadIdx.x < n) {
      float sum = 0.f;
#pragma unroll 1
      for (int i = 0; i < kPixels; i += kTileColumns) {
        float some[kTileColumns];
        load_floats(some, shared.grads + threadIdx.x * kStride + i);
#pragma unroll
        for (int e = 0; e < kTileColumns; ++e) sum += some[e];
      }
      of_bias += sum;
    }
    __syncthreads();
    for (int unit = warp; unit < kBranches * kPixels / 16; unit += kWarps) {
      const int b = unit % kBranches, column = unit / kBranches * 16;
      const Lines<T, true> right{shared.grads + column, kStride};
      float c[2][4] = {};
      if constexpr (sizeof(T) == 2) {
        warp_product(c, Lines<T, true>{shared.mix + b * kChannels, kMixStride}, right, padded,
                     lane);
      } else {
        warp_product(c, Lines<T, true>{mix_weight + b * n, kBranches * n}, count, right, n, lane);
      }
      T* const to =
          shared.branches + (b * kChannels + lane / 4) * kStride + column + 2 * (lane % 4);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          store_vector(to + half * 8 * kStride + 8 * j,
                       ElementVector<T, 2>{from_float<T>(c[j][2 * half]),
                                           from_float<T>(c[j][2 * half + 1])});
        }
      }
    }
    __syncthreads();
    for (int b = 0; b < kBranches; ++b) {
      write_planes<kRows>(args.branch_maps, tile, first, count,
                          shared.branches + b * kChannels * kStride, kStride,
                          args.branches + kBranches * image + b * maps.image());
    }
  }
  const PartSums places(maps.channels, n);
  float* const sums = args.parts + part * places.size;
  if (begin == 0 && threadIdx.x < n) sums[places.mix_bias + group + threadIdx.x] = of_bias;
  for (int i = threadIdx.x; i < n * kMixed; i += kThreads) {
    const int row = i / kMixed, b = i % kMixed / kChannels, c = i % kChannels;
    if (c >= count) continue;
    const int64_t at = (int64_t{1} * (group + row) * kBranches + b) * n + begin + c;
    sums[places.mix_weight + at] = shared.sums[row * kMixStride + i % kMixed];
  }
}

// What a thread sums for its channel: of row dy of each kernel the columns, and a bias.
struct TapSums {
  float of[kBranches][kLargestKernel], bias;
};

// += those of a tile. `grads`: the channel's plane of the first branch's gradient, the next one is
// `branch` further.
template <class T>
__device__ __forceinline__ void correlate(TapSums& total, const T* grads, int branch, const T* x,
                                          int dy) {
  TapSums sums = {};
#pragma unroll 1
  for (int row = 0; row < kRows; ++row) {
    float values[kPitch];
    load_floats(values, x + (row + dy) * kPitch);
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
      if (!reaches(b, dy)) continue;
      float grad[kTileColumns];
      load_floats(grad, grads + b * branch + (row + kLargestMargin) * kPitch + kBefore);
#pragma unroll
      for (int dx = b; dx < kLargestKernel - b; ++dx) {
#pragma unroll
        for (int i = 0; i < kTileColumns; ++i) {
          sums.of[b][dx] = fmaf(grad[i], values[i + dx + kBefore - kLargestMargin], sums.of[b][dx]);
        }
      }
      if (b == dy) {
#pragma unroll
        for (int i = 0; i < kTileColumns; ++i) sums.bias += grad[i];
      }
    }
  }
#pragma unroll
  for (int b = 0; b < kBranches; ++b) {
#pragma unroll
    for (int dx = b; dx < kLargestKernel - b; ++dx) total.of[b][dx] += sums.of[b][dx];
  }
  total.bias += sums.bias;
}

// sum = what x gets in this thread's row from the branches' gradients.
template <class T>
__device__ __forceinline__ void turn_back(float (&sum)[kTileColumns], const T* grads, int branch,
                                          int row, const float* taps) {
#pragma unroll
  for (int i = 0; i < kTileColumns; ++i) sum[i] = 0.f;
#pragma unroll
  for (int dy = 0; dy < kLargestKernel; ++dy) {
    float tap[16];
    load_tap_row(tap, taps, dy);
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
      if (!reaches(b, dy)) continue;
      float grad[kPitch];
      load_floats(grad, grads + b * branch + (row + kLargestKernel - 1 - dy) * kPitch);
#pragma unroll
      for (int dx = b; dx < kLargestKernel - b; ++dx) {
#pragma unroll
        for (int i = 0; i < kTileColumns; ++i) {
          sum[i] =
              fmaf(grad[i + kBefore + kLargestMargin - dx], tap[tap_column(b) + dx - b], sum[i]);
        }
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    tap_gradient_kernel(const BackwardArguments<T> args) {
  using Shared = TapShared<T>;
  KP_DYNAMIC_SHARED(unsigned char, memory);
  Shared shared;
  Place place{memory};
  shared.lay(0, place);

  const TiledMaps& maps = args.maps;
  const int turns = static_cast<int>(ceil_div(maps.channels, kChannels));
  const int first = blockIdx.x % turns * kChannels, part = blockIdx.x / turns;
  const int parts = gridDim.x / turns, count = min(maps.channels - first, kChannels);
  read_taps(args.parameters.weights, first, count, kChannels, shared.taps);

  constexpr int kBranch = plane_at<T, kRows>(kChannels);  // from one branch's planes to the next's
  const RowOfTile<kRows> own;
  const int channel = threadIdx.x % kChannels, dy = threadIdx.x / kChannels;  // of the sums
  TapSums total = {};
  for (int64_t which = part; which < maps.count; which += parts) {
    const PixelTile tile(maps, which);
    const int64_t image = tile.image * maps.image();
    read_tile<kRows>(maps, args.x + image, tile, first, count, kChannels, shared.planes);
    for (int b = 0; b < kBranches; ++b) {
      read_tile<kRows>(args.branch_maps, args.branches + kBranches * image + b * maps.image(), tile,
                       first, count, kChannels, shared.branches + b * kBranch);
    }
    __syncthreads();
    float sum[kTileColumns];
    turn_back(sum, shared.branches + plane_at<T, kRows>(own.channel), kBranch, own.row,
              shared.taps + own.channel * kTapSpace);
#pragma unroll
    for (int i = 0; i < kTileColumns; ++i) {
      shared.sums[own.channel * Shared::kSums + own.row * kTileColumns + i] = sum[i];
    }
    if (dy < kLargestKernel) {
      const int at = plane_at<T, kRows>(channel);
      correlate(total, shared.branches + at, kBranch, shared.planes + at, dy);
    }
    __syncthreads();
    write_tile<kRows>(maps, tile, first, count, shared.sums, Shared::kSums, args.grad_out + image,
                      args.grad_x + image);
  }
  if (dy >= kLargestKernel || channel >= count) return;
  const PartSums places(maps.channels, args.group);
  float* const sums = args.parts + part * places.size;
#pragma unroll
  for (int b = 0; b < kBranches; ++b) {
    if (dy == b) sums[places.biases[b] + first + channel] = total.bias;
    if (!reaches(b, dy)) continue;
    const int side = branch_side(b);
    float* const to =
        sums + places.weights[b] + (int64_t{1} * (first + channel) * side + dy - b) * side;
#pragma unroll
    for (int dx = b; dx < kLargestKernel - b; ++dx) to[dx - b] = total.of[b][dx];
  }
}

// The parameters' gradients, of the parts' sums.
__global__ void __launch_bounds__(256)
    add_parts_kernel(const float* parts, int count, PartSums places, MultiGranularityGradients to,
                     int64_t channels) {
  const int64_t i = int64_t{1} * blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= places.size) return;
  float sum = 0.f;
#pragma unroll 8
  for (int part = 0; part < count; ++part) sum += parts[part * places.size + i];
  float* array = to.mix_bias;
  int64_t begin = places.mix_bias;
  if (i < places.mix_bias) array = to.mix_weight, begin = places.mix_weight;
#pragma unroll
  for (int b = kBranches - 1; b >= 0; --b) {
    if (i < places.biases[b] + channels) array = to.biases[b], begin = places.biases[b];
  }
#pragma unroll
  for (int b = kBranches - 1; b >= 0; --b) {
    const int side = branch_side(b);
    if (i < places.weights[b] + channels * side * side) {
      array = to.weights[b], begin = places.weights[b];
    }
  }
  array[i - begin] = sum;
}

// Blocks that share the tiles of the same channels, so that all run at once.
int64_t parts_of(const MultiGranularityShape& shape) {
  const int64_t tiles = TiledMaps(shape, kRows, false).count;
  const int64_t turns = ceil_div(shape.maps.channels, kChannels);
  const int64_t at_once = kBlocks * device_attribute(cudaDevAttrMultiProcessorCount);
  return std::min(tiles, ceil_div(at_once, turns));
}

PartSums places_of(const MultiGranularityShape& shape) {
  return {shape.maps.channels, shape.group_channels()};
}

// Bytes of the sums, which come first in the workspace.
int64_t parts_bytes(const MultiGranularityShape& shape) {
  return ceil_div(parts_of(shape) * places_of(shape).size * sizeof(float), 16) * 16;
}

template <class T>
cudaError_t launch_backward(const T* grad_out, const T* x,
                            const MultiGranularityWeights& parameters,
                            const MultiGranularityGradients& gradients, unsigned char* workspace,
                            const MultiGranularityShape& shape, cudaStream_t stream) {
  const int group = static_cast<int>(shape.group_channels()), padded = round_up(group, 16);
  MultiGranularityShape of_branches = shape;  // a plane after the other
  of_branches.maps.channels_last = false;
  T* const grad_x = static_cast<T*>(gradients.x);
  T* const branches = reinterpret_cast<T*>(workspace + parts_bytes(shape));
  const int groups = static_cast<int>(shape.groups);
  const BackwardArguments<T> args = {
      grad_out,
      x,
      grad_x,
      parameters,
      branches,
      reinterpret_cast<float*>(workspace),
      TiledMaps(shape, kRows, by_vectors<T>(shape, group, {grad_out, x, grad_x})),
      TiledMaps(of_branches, kRows, by_vectors<T>(of_branches, 1, {branches})),
      groups,
      group,
      padded};
  const int64_t parts = parts_of(shape);
  const auto run = [&](auto kernel, int64_t turns, int bytes) {
    return launch(kernel, dim3(static_cast<unsigned>(parts * turns)), dim3(kThreads), bytes, stream,
                  args);
  };
  cudaError_t error = run(mix_gradient_kernel<T>, groups * (padded / kChannels),
                          shared_bytes<MixShared<T>>(padded));
  if (error != cudaSuccess) return error;
  error = run(tap_gradient_kernel<T>, ceil_div(shape.maps.channels, kChannels),
              shared_bytes<TapShared<T>>(padded));
  if (error != cudaSuccess) return error;
  const PartSums places = places_of(shape);
  return launch(add_parts_kernel, dim3(static_cast<unsigned>(ceil_div(places.size, 256))),
                dim3(256), 0, stream, args.parts, static_cast<int>(parts), places, gradients,
                shape.maps.channels);
}

}  // namespace

int64_t multi_granularity_backward_workspace(const MultiGranularityShape& shape, DType dtype) {
  const int64_t element = dtype == DType::kFloat32 ? 4 : 2;
  return parts_bytes(shape) + kBranches * shape.maps.batch * shape.maps.image() * element;
}

cudaError_t multi_granularity_backward(const void* grad_out, const void* x,
                                       const MultiGranularityWeights& weights,
                                       const MultiGranularityGradients& gradients, void* workspace,
                                       const MultiGranularityShape& shape, DType dtype,
                                       cudaStream_t stream) {
  if (!fits(shape)) return cudaErrorInvalidValue;
  return channel_passes::with_element(dtype, [&](auto element) {
    using T = decltype(element);
    return launch_backward(static_cast<const T*>(grad_out), static_cast<const T*>(x), weights,
                           gradients, static_cast<unsigned char*>(workspace), shape, stream);
  });
}

}  // namespace kernelpose::cuda
