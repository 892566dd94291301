// What ops share that sum over the pixels of each channel and then scale each channel by numbers
// made of those sums: the two passes over maps in either memory format.
//
// A block takes some channels of one image, all their pixels. T is the element type, N the elements
// of a vector:
//
//   channels_last  pixel 0 | N N N N N N N N | ...   kLanes lanes a pixel, 128 bytes of it, and
//                  pixel 1 | N N N N N N N N | ...   kThreads / kLanes pixels at a time
//   contiguous     channel | N N N ...       |       a warp a channel, kWarpChannels in turn
//
// The second pass finds an image in the L2 cache as long as a batch fits in. A sum is taken in one
// order: no atomics, the same bits on every run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernelpose/dtype.h"
#include "kernelpose/launch.cuh"
#include "kernelpose/maps.h"
#include "kernelpose/numerics.cuh"
#include "kernelpose/vector.cuh"

namespace kernelpose::channel_passes {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kWarpChannels = 4;  // of a warp, where pixels are neighbours

// Places of which a thread has the vectors under way: 16 x 12 pixels are a whole number of such.
template <int kTensors>
constexpr int kBatch = kTensors == 1 ? 3 : 2;

template <int N>
constexpr int kLanes = N == 1 ? 32 : 8;

// Channels of a block.
template <int N, bool kChannelsLast>
constexpr int kBlockChannels = kChannelsLast ? kLanes<N> * N : kWarps * kWarpChannels;

__device__ __forceinline__ float warp_sum(float x, int lanes = 1) {
#pragma unroll
  for (int offset = 16; offset >= 1; offset /= 2) {
    if (offset >= lanes) x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  return x;
}

// Each sum over the block, in all threads. `partial` holds kWarps numbers for each and may not be
// written again before another barrier.
template <int kSums>
__device__ __forceinline__ void block_sums(float (&sums)[kSums], float* partial) {
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    sums[k] = warp_sum(sums[k]);
    if (threadIdx.x % 32 == 0) partial[k * kWarps + threadIdx.x / 32] = sums[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    sums[k] = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sums[k] += partial[k * kWarps + w];
  }
}

// The largest over the block, in all threads; `partial` as above.
__device__ __forceinline__ float block_maximum(float x, float* partial) {
#pragma unroll
  for (int offset = 16; offset >= 1; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = partial[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) x = fmaxf(x, partial[w]);
  return x;
}

// Calls use(offset from the image's first element, values[kInputs][N]) for vectors at first,
// first + step, ... below end.
template <int N, int kTensors, int kInputs, class T, class Use>
__device__ __forceinline__ void for_vectors(const T* const (&inputs)[kInputs], int64_t first,
                                            int64_t end, int64_t step, const Use& use) {
  constexpr int kCount = kBatch<kTensors>;
  for (int64_t at = first; at < end; at += kCount * step) {
    ElementVector<T, N> loaded[kCount][kInputs];
#pragma unroll
    for (int b = 0; b < kCount; ++b) {
      if (at + b * step >= end) break;
#pragma unroll
      for (int i = 0; i < kInputs; ++i) loaded[b][i] = load_vector<N>(inputs[i] + at + b * step);
    }
#pragma unroll
    for (int b = 0; b < kCount; ++b) {
      if (at + b * step >= end) break;
      use(at + b * step, loaded[b]);
    }
  }
}

// What op.inputs hold for an image, beginning with its first element.
template <class Op>
struct ImageInputs {
  using T = typename Op::Element;
  const T* pointers[Op::kInputs];

  __device__ __forceinline__ ImageInputs(const Op& op, int64_t image) {
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) pointers[i] = op.inputs[i] + image * op.maps.image();
  }
};

template <class Op, int N>
__device__ __forceinline__ void accumulate(
    const Op& op, const ElementVector<typename Op::Element, N> (&loaded)[Op::kInputs], int element,
    float (&sums)[Op::kSums]) {
  float values[Op::kInputs];
#pragma unroll
  for (int i = 0; i < Op::kInputs; ++i) values[i] = to_float(loaded[i].values[element]);
  op.accumulate(values, sums);
}

// The first pass. Op: Element, kInputs, kSums, maps, inputs, accumulate(values, sums) of one place,
// finish(image, channel, sums).
template <class Op, int N, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 3) channel_sums(const Op op) {
  using T = typename Op::Element;
  constexpr int kChannels = kBlockChannels<N, kChannelsLast>;
  const Maps& maps = op.maps;
  const int64_t chunks = (maps.channels + kChannels - 1) / kChannels;
  const int64_t image = blockIdx.x / chunks;
  const int64_t first = blockIdx.x % chunks * kChannels;
  const ImageInputs<Op> inputs(op, image);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if constexpr (kChannelsLast) {
    KP_DYNAMIC_SHARED(float, shared);  // (kWarps, kSums, kChannels)
    float sums[N][Op::kSums] = {};
    const int64_t channel = first + threadIdx.x % kLanes<N> * N;
    if (channel < maps.channels) {
      for_vectors<N, Op::kInputs>(inputs.pointers,
                                  threadIdx.x / kLanes<N> * maps.channels + channel, maps.image(),
                                  kThreads / kLanes<N> * maps.channels,
                                  [&](int64_t, const ElementVector<T, N>(&loaded)[Op::kInputs]) {
#pragma unroll
                                    for (int e = 0; e < N; ++e)
                                      accumulate<Op, N>(op, loaded, e, sums[e]);
                                  });
    }
#pragma unroll
    for (int e = 0; e < N; ++e) {
#pragma unroll
      for (int k = 0; k < Op::kSums; ++k) {
        const float sum = warp_sum(sums[e][k], kLanes<N>);
        if (lane < kLanes<N>) shared[(warp * Op::kSums + k) * kChannels + lane * N + e] = sum;
      }
    }
    __syncthreads();
    if (threadIdx.x < kChannels && first + threadIdx.x < maps.channels) {
      float totals[Op::kSums] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
#pragma unroll
        for (int k = 0; k < Op::kSums; ++k) {
          totals[k] += shared[(w * Op::kSums + k) * kChannels + threadIdx.x];
        }
      }
      op.finish(image, first + threadIdx.x, totals);
    }
  } else {
    for (int j = 0; j < kWarpChannels; ++j) {
      const int64_t channel = first + j * kWarps + warp;
      if (channel >= maps.channels) break;
      float sums[Op::kSums] = {};
      for_vectors<N, Op::kInputs>(inputs.pointers, channel * maps.pixels + lane * N,
                                  (channel + 1) * maps.pixels, 32 * N,
                                  [&](int64_t, const ElementVector<T, N>(&loaded)[Op::kInputs]) {
#pragma unroll
                                    for (int e = 0; e < N; ++e)
                                      accumulate<Op, N>(op, loaded, e, sums);
                                  });
#pragma unroll
      for (int k = 0; k < Op::kSums; ++k) sums[k] = warp_sum(sums[k]);
      if (lane == 0) op.finish(image, channel, sums);
    }
  }
}

template <class Op, int N>
__device__ __forceinline__ void combine(
    const Op& op, const ElementVector<typename Op::Element, N> (&loaded)[Op::kInputs], int element,
    const float (&factors)[Op::kFactors],
    ElementVector<typename Op::Element, N> (&results)[Op::kOutputs]) {
  using T = typename Op::Element;
  float values[Op::kInputs], outputs[Op::kOutputs];
#pragma unroll
  for (int i = 0; i < Op::kInputs; ++i) values[i] = to_float(loaded[i].values[element]);
  op.combine(values, factors, outputs);
#pragma unroll
  for (int i = 0; i < Op::kOutputs; ++i) results[i].values[element] = from_float<T>(outputs[i]);
}

template <class Op, int N>
__device__ __forceinline__ void store_results(
    const Op& op, int64_t image, int64_t at,
    const ElementVector<typename Op::Element, N> (&results)[Op::kOutputs]) {
#pragma unroll
  for (int i = 0; i < Op::kOutputs; ++i) {
    store_vector(op.outputs[i] + image * op.maps.image() + at, results[i]);
  }
}

// The second pass. Op: Element, kInputs, kOutputs, kFactors, kShared, maps, inputs, outputs;
// prepare(image, shared) makes of all sums what an image's channels need, by the whole block and
// with kShared floats; factors(image, channel, prepared, owner, factors) of one channel, where one
// of the threads that ask is its owner; combine(values, factors, results) of one place.
template <class Op, int N, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 3) scale_channels(const Op op) {
  using T = typename Op::Element;
  KP_DYNAMIC_SHARED(float, shared);
  constexpr int kChannels = kBlockChannels<N, kChannelsLast>;
  constexpr int kTensors = Op::kInputs > Op::kOutputs ? Op::kInputs : Op::kOutputs;
  const Maps& maps = op.maps;
  const int64_t chunks = (maps.channels + kChannels - 1) / kChannels;
  const int64_t image = blockIdx.x / chunks;
  const int64_t first = blockIdx.x % chunks * kChannels;
  const ImageInputs<Op> inputs(op, image);
  const auto prepared = op.prepare(image, shared);
  if constexpr (kChannelsLast) {
    const int row = threadIdx.x / kLanes<N>;
    const int64_t channel = first + threadIdx.x % kLanes<N> * N;
    if (channel >= maps.channels) return;
    float factors[N][Op::kFactors];
#pragma unroll
    for (int e = 0; e < N; ++e) op.factors(image, channel + e, prepared, row == 0, factors[e]);
    for_vectors<N, kTensors>(inputs.pointers, row * maps.channels + channel, maps.image(),
                             kThreads / kLanes<N> * maps.channels,
                             [&](int64_t at, const ElementVector<T, N>(&loaded)[Op::kInputs]) {
                               ElementVector<T, N> results[Op::kOutputs];
#pragma unroll
                               for (int e = 0; e < N; ++e) {
                                 combine<Op, N>(op, loaded, e, factors[e], results);
                               }
                               store_results<Op, N>(op, image, at, results);
                             });
  } else {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int j = 0; j < kWarpChannels; ++j) {
      const int64_t channel = first + j * kWarps + warp;
      if (channel >= maps.channels) return;
      float factors[Op::kFactors];
      op.factors(image, channel, prepared, lane == 0, factors);
      for_vectors<N, kTensors>(inputs.pointers, channel * maps.pixels + lane * N,
                               (channel + 1) * maps.pixels, 32 * N,
                               [&](int64_t at, const ElementVector<T, N>(&loaded)[Op::kInputs]) {
                                 ElementVector<T, N> results[Op::kOutputs];
#pragma unroll
                                 for (int e = 0; e < N; ++e) {
                                   combine<Op, N>(op, loaded, e, factors, results);
                                 }
                                 store_results<Op, N>(op, image, at, results);
                               });
    }
  }
}

template <class Op, int N, bool kChannelsLast>
cudaError_t launch_blocks(void (*kernel)(Op), const Op& op, size_t floats, cudaStream_t stream) {
  constexpr int kChannels = kBlockChannels<N, kChannelsLast>;
  const int64_t blocks = op.maps.batch * ((op.maps.channels + kChannels - 1) / kChannels);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), floats * sizeof(float),
                stream, op);
}

template <class Sums, class Scale, int N, bool kChannelsLast>
cudaError_t launch_passes(const Sums& sums, const Scale& scale, cudaStream_t stream) {
  constexpr size_t kFloats =
      kChannelsLast ? kWarps * Sums::kSums * kBlockChannels<N, kChannelsLast> : 0;
  const cudaError_t error = launch_blocks<Sums, N, kChannelsLast>(
      channel_sums<Sums, N, kChannelsLast>, sums, kFloats, stream);
  if (error != cudaSuccess) return error;
  return launch_blocks<Scale, N, kChannelsLast>(scale_channels<Scale, N, kChannelsLast>, scale,
                                                Scale::kShared, stream);
}

template <class T, int kCount>
bool aligned(T* const (&pointers)[kCount]) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return true;
}

// Both passes of an op, in vectors of 16 bytes where its maps are made of such.
template <class Sums, class Scale>
cudaError_t run(const Sums& sums, const Scale& scale, cudaStream_t stream) {
  constexpr int kWidest = kWidestVector<typename Sums::Element>;
  const Maps& maps = sums.maps;
  const int64_t row = maps.channels_last ? maps.channels : maps.pixels;
  const bool wide =
      row % kWidest == 0 && aligned(sums.inputs) && aligned(scale.inputs) && aligned(scale.outputs);
  if (maps.channels_last) {
    return wide ? launch_passes<Sums, Scale, kWidest, true>(sums, scale, stream)
                : launch_passes<Sums, Scale, 1, true>(sums, scale, stream);
  }
  return wide ? launch_passes<Sums, Scale, kWidest, false>(sums, scale, stream)
              : launch_passes<Sums, Scale, 1, false>(sums, scale, stream);
}

// run(element) with an element of the type that dtype names.
template <class Run>
cudaError_t with_element(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat16:
      return run(__half{});
    case DType::kBFloat16:
      return run(__nv_bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace kernelpose::channel_passes
