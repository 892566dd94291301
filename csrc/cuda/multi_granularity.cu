// Forward. A block takes one group and tiles of pixels in turn (multi_granularity_tiles.cuh):
//
//   planes of some channels --3 convolutions--> branches (3n x pixels), rounded to T
//   mix_weight (n x 3n) * branches -> sums (n x pixels) in place of the branches -> out
//
// n, the channels of a group, is filled up to a multiple of 16. mix_weight lies in shared memory
// for 16-bit elements, for float it is read where it is.
//
// Floor: x read and out written once, at 64 maps of 768 x 16 x 12 in half 38 MB, 13 us of an H100's
// memory; but 83 products a channel and pixel that no tensor core takes, 27 us of its FMA units.
// Shared memory: 65 KB a block that takes 24 of a group's 48 channels at a time, in half.
//
// budget: multi_granularity_forward_kernel<*> registers<=96
#include <algorithm>

#include "kernelpose/channel_passes.cuh"
#include "kernelpose/warp_product.cuh"
#include "multi_granularity.h"
#include "multi_granularity_tiles.cuh"

namespace kernelpose::cuda {

using namespace granularity;

namespace {

constexpr int kMaxThreads = 640;
constexpr int kHeld = 2;  // parts of the product that a warp holds

template <class T, int kRows>
struct ForwardTile {
  // Columns of branches; a warp computes kWarpColumns of 16 channels at a time.
  static constexpr int kColumns = round_up(kRows * kTileColumns, 16);
  static constexpr int kStride = kColumns + 8;  // an odd multiple of 16 bytes
  static constexpr int kSums = kColumns + 9;    // 8 channels of a pixel are in 4 banks at least
  static constexpr int kWarpColumns = kRows == 8 ? 48 : kColumns;
  static constexpr int kUnits = kRows == 8 ? 8 : 16;  // channels at a time are a multiple of
};

struct ForwardPlan {
  int threads, channels;  // of a block at a time
  int bytes, blocks;      // of shared memory; blocks that should run at once
};

template <class T>
struct ForwardArguments {
  const T* x;
  T* out;
  MultiGranularityWeights parameters;
  TiledMaps maps;
  int groups, group, padded;  // channels of a group
  int channels;               // at a time
};

KP_HOST_DEVICE constexpr int mix_stride(int padded) { return kBranches * padded + 8; }

template <class T, int kRows>
__global__ void __launch_bounds__(kMaxThreads)
    multi_granularity_forward_kernel(const ForwardArguments<T> args) {
  using Shape = ForwardTile<T, kRows>;
  KP_DYNAMIC_SHARED(unsigned char, shared);
  const int n = args.group, padded = args.padded, at_once = args.channels;
  T* const branches = reinterpret_cast<T*>(shared);  // (3, padded, kStride)
  float* const sums = reinterpret_cast<float*>(shared);
  T* const planes = branches + bytes_of<T>(kBranches * padded * Shape::kStride) / sizeof(T);
  float* const taps = reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(planes) +
                                               bytes_of<T>(plane_at<T, kRows>(at_once)));
  T* const mix = reinterpret_cast<T*>(taps + at_once * kTapSpace);  // (padded, mix_stride)

  const TiledMaps& maps = args.maps;
  const MultiGranularityWeights& p = args.parameters;
  const int first = blockIdx.x % args.groups * n, lane = threadIdx.x % 32;
  const float* const mix_weight = p.mix_weight + int64_t{first} * kBranches * n;
  if constexpr (sizeof(T) == 2) {
    for (int i = threadIdx.x; i < padded * kBranches * padded; i += blockDim.x) {
      const int row = i / (kBranches * padded), k = i % (kBranches * padded), c = k % padded;
      const bool exists = row < n && c < n;
      mix[row * mix_stride(padded) + k] =
          from_float<T>(exists ? mix_weight[(row * kBranches + k / padded) * n + c] : 0.f);
    }
  }
  const RowOfTile<kRows> own;
  const int step = gridDim.x / args.groups;
  for (int64_t which = blockIdx.x / args.groups; which < maps.count; which += step) {
    const PixelTile tile(maps, which);
    const T* const x = args.x + tile.image * maps.image();
    for (int c = 0; c < padded; c += at_once) {
      read_tile<kRows>(maps, x, tile, first + c, n - c, at_once, planes);
      if (at_once < padded || which < step) read_taps(p.weights, first + c, n - c, at_once, taps);
      __syncthreads();
      const int channel = c + own.channel;
      if (channel < padded) {
        convolve<kRows>(own, planes, taps, p.biases, first + channel, channel < n,
                        branches + channel * Shape::kStride, padded * Shape::kStride);
      }
      __syncthreads();
    }
    constexpr int kWide = Shape::kColumns / Shape::kWarpColumns;
    float c[kHeld][Shape::kWarpColumns / 8][4] = {};
    const auto row_of = [&](int held) {
      return (threadIdx.x + held * blockDim.x) / 32 / kWide * 16;
    };
    const auto column_of = [&](int held) {
      return (threadIdx.x + held * blockDim.x) / 32 % kWide * Shape::kWarpColumns;
    };
#pragma unroll
    for (int held = 0; held < kHeld; ++held) {
      const int row = row_of(held);
      if (row >= padded) continue;
      const T* const right = branches + column_of(held);
      if constexpr (sizeof(T) == 2) {
        const int stride = mix_stride(padded);
        warp_product(c[held], Lines<T, false>{mix + row * stride, stride},
                     Lines<T, true>{right, Shape::kStride}, kBranches * padded, lane);
      } else {
        if (row >= n) continue;
        for (int b = 0; b < kBranches; ++b) {
          warp_product(c[held],
                       Lines<T, false>{mix_weight + (row * kBranches + b) * n, kBranches * n},
                       n - row, Lines<T, true>{right + b * padded * Shape::kStride, Shape::kStride},
                       n, lane);
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int held = 0; held < kHeld; ++held) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(held) + lane / 4 + 8 * half;
        if (row >= n) continue;
        const float bias = p.mix_bias[first + row];
        float* const to = sums + row * Shape::kSums + column_of(held) + 2 * (lane % 4);
#pragma unroll
        for (int j = 0; j < Shape::kWarpColumns / 8; ++j) {
          to[8 * j] = c[held][j][2 * half] + bias;
          to[8 * j + 1] = c[held][j][2 * half + 1] + bias;
        }
      }
    }
    __syncthreads();
    write_tile<kRows>(maps, tile, first, n, sums, Shape::kSums, x,
                      args.out + tile.image * maps.image());
  }
}

template <class T, int kRows>
constexpr int forward_bytes(int padded, int channels) {
  using Shape = ForwardTile<T, kRows>;
  static_assert(kBranches * Shape::kStride * sizeof(T) >= Shape::kSums * sizeof(float));
  return bytes_of<T>(kBranches * padded * Shape::kStride) +
         bytes_of<T>(plane_at<T, kRows>(channels)) + bytes_of<float>(channels * kTapSpace) +
         (sizeof(T) == 2 ? bytes_of<T>(padded * mix_stride(padded)) : 0);
}

// The fewest channels at a time, as kHeld has it.
template <class T, int kRows>
constexpr int fewest_channels(int padded) {
  using Shape = ForwardTile<T, kRows>;
  const int warps = round_up(padded / 16 * (Shape::kColumns / Shape::kWarpColumns), kHeld) / kHeld;
  return round_up(32 * warps / kRows, Shape::kUnits);
}

template <class T, int kRows>
constexpr int kLeastBytes =
    forward_bytes<T, kRows>(kMaxGroupChannels, fewest_channels<T, kRows>(kMaxGroupChannels));
static_assert(kLeastBytes<float, 8> <= kSharedLimit && kLeastBytes<__half, 8> <= kSharedLimit);
static_assert(kLeastBytes<float, 2> <= kSharedLimit && kLeastBytes<__half, 2> <= kSharedLimit);

// The number of channels at a time with which most warps are at work on a multiprocessor.
template <class T, int kRows>
ForwardPlan plan_forward(int padded) {
  using Shape = ForwardTile<T, kRows>;
  constexpr int kRegisters = 96, kOfMultiprocessor = 65536, kOfBlock = 1024;
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ForwardPlan best = {};
  for (int channels = fewest_channels<T, kRows>(padded);
       channels <= round_up(padded, Shape::kUnits) && kRows * channels <= kMaxThreads;
       channels += Shape::kUnits) {
    const int threads = kRows * channels, bytes = forward_bytes<T, kRows>(padded, channels);
    if (bytes > limit) continue;
    const int blocks = std::min(
        {(limit + kOfBlock) / (bytes + kOfBlock), kOfMultiprocessor / (kRegisters * threads), 16});
    // Channels that the last turn lacks are idle threads.
    const auto busy = [&](const ForwardPlan& p) {
      return p.channels == 0 ? 0 : p.blocks * p.threads * padded / round_up(padded, p.channels);
    };
    const ForwardPlan plan = {threads, channels, bytes, blocks};
    if (busy(plan) > busy(best)) best = plan;
  }
  return best;
}

template <class T, int kRows>
cudaError_t launch_forward(const T* x, const MultiGranularityWeights& parameters, T* out,
                           const MultiGranularityShape& shape, cudaStream_t stream) {
  const int group = static_cast<int>(shape.group_channels()), padded = round_up(group, 16);
  const TiledMaps maps(shape, kRows, by_vectors<T>(shape, group, {x, out}));
  const ForwardPlan plan = plan_forward<T, kRows>(padded);
  if (plan.threads == 0) {  // no room in this device's shared memory
    if constexpr (kRows == 8) return launch_forward<T, 2>(x, parameters, out, shape, stream);
    return cudaErrorInvalidValue;
  }
  const int groups = static_cast<int>(shape.groups);
  const int at_once = plan.blocks * device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t parts = std::min(maps.count, ceil_div(at_once, groups));
  return launch(
      multi_granularity_forward_kernel<T, kRows>, dim3(static_cast<unsigned>(parts * groups)),
      dim3(plan.threads), plan.bytes, stream,
      ForwardArguments<T>{x, out, parameters, maps, groups, group, padded, plan.channels});
}

}  // namespace

cudaError_t multi_granularity_forward(const void* x, const MultiGranularityWeights& weights,
                                      void* out, const MultiGranularityShape& shape, DType dtype,
                                      cudaStream_t stream) {
  if (!fits(shape)) return cudaErrorInvalidValue;
  // Low tiles read more margin than pixels, but occupy the device where there are few.
  const int64_t blocks = shape.groups * TiledMaps(shape, 8, false).count;
  const bool low = blocks < device_attribute(cudaDevAttrMultiProcessorCount);
  return channel_passes::with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = low ? launch_forward<T, 2> : launch_forward<T, 8>;
    return run(static_cast<const T*>(x), weights, static_cast<T*>(out), shape, stream);
  });
}

}  // namespace kernelpose::cuda
