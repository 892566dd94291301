// How a block of spatial_gate walks its unit: the smallest set of channels of an image that is
// closed under grouping and pairing. With an even number of groups that is a group and its partner
// in the other half, else all channels. A channel and its partner are read by one thread, N
// neighbouring elements of each at a time:
//
//   channels_last  pixel 0 | N N N N N N N N |    a warp: kLanes vectors of kRows pixels; the
//                  pixel 1 | N N N N N N N N |    pixels in `parts` over as many warps
//   contiguous     channel | N N N ...       |    a warp a channel
//
// Every pass over the unit goes the same way, so a thread meets the same elements again.
#pragma once

#include "kernelpose/channel_passes.cuh"
#include "kernelpose/spatial_gate.h"
#include "kernelpose/vector.cuh"

namespace kernelpose::cuda {

using channel_passes::warp_sum;

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kLanes = 8, kRows = 32 / kLanes;

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

struct Unit {
  int channels, pixels, pairs;
  int size;    // channels of a group
  int units;   // of an image
  int count;   // pairs of channels of a unit
  int groups;  // of a unit
  int parts;   // of the pixels, each with sums of its own
  int tasks;   // of a unit, each for a warp
  int steps;   // at most, of a lane in a task

  Unit(const SpatialGateShape& shape, int n) {
    channels = static_cast<int>(shape.maps.channels);
    pixels = static_cast<int>(shape.maps.pixels);
    pairs = channels / 2;
    size = static_cast<int>(shape.group_channels());
    units = shape.groups % 2 == 0 ? static_cast<int>(shape.groups / 2) : 1;
    count = pairs / units;
    groups = static_cast<int>(shape.groups / units);
    if (shape.maps.channels_last) {
      const int chunks = ceil_div(count, kLanes * n);
      parts = chunks < kWarps ? kWarps / chunks : 1;
      tasks = chunks * parts;
      steps = ceil_div(pixels, kRows * parts);
    } else {
      parts = 1;
      tasks = count;
      steps = ceil_div(pixels, 32 * n);
    }
  }
  int turns() const { return ceil_div(tasks, kWarps); }
  KP_HOST_DEVICE int sums() const { return 2 * parts * count; }  // numbers, for one a channel

  __device__ __forceinline__ int64_t image() const { return int64_t{1} * channels * pixels; }
  // The channel of the image that is the j-th of the unit; partners are `count` apart.
  __device__ __forceinline__ int channel(int unit, int j) const {
    return unit * count + (j < count ? j : pairs - count + j);
  }
};

// What a lane does in a task.
struct Lane {
  int j;  // its first channel in the unit
  int part;
  int offset, step, steps;  // of its vectors in the image
};

template <int N, bool kChannelsLast>
__device__ __forceinline__ Lane lane_of(const Unit& u, int unit, int task) {
  const int lane = threadIdx.x % 32;
  Lane result;
  if constexpr (kChannelsLast) {
    result.part = task % u.parts;
    result.j = (task / u.parts * kLanes + lane % kLanes) * N;
    const int pixel = result.part * kRows + lane / kLanes;
    result.offset = pixel * u.channels + unit * u.count + result.j;
    result.step = u.parts * kRows * u.channels;
    const bool idle = result.j >= u.count || pixel >= u.pixels;
    result.steps = idle ? 0 : (u.pixels - pixel - 1) / (u.parts * kRows) + 1;
  } else {
    result.part = 0;
    result.j = task;
    result.offset = (unit * u.count + task) * u.pixels + lane * N;
    result.step = 32 * N;
    result.steps = lane * N >= u.pixels ? 0 : (u.pixels - lane * N - 1) / (32 * N) + 1;
  }
  return result;
}

template <class T, int N>
struct Pair {
  ElementVector<T, N> of[2];  // a channel and its partner, or N of each
};

// Calls use(step, fetched) for every step of a lane, fetched = fetch(step), kBatch of them under
// way.
template <int kBatch, class Fetch, class Use>
__device__ __forceinline__ void for_each_step(const Lane& lane, const Fetch& fetch,
                                              const Use& use) {
  for (int s = 0; s < lane.steps; s += kBatch) {
    decltype(fetch(0)) fetched[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (s + b < lane.steps) fetched[b] = fetch(s + b);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (s + b < lane.steps) use(s + b, fetched[b]);
    }
  }
}

template <class T, int N>
__device__ __forceinline__ Pair<T, N> load_pair(const T* image, int at, int to_partner) {
  return {{load_vector<N>(image + at), load_vector<N>(image + at + to_partner)}};
}

// A lane's sums, of N channels and partners (of one each, where pixels are neighbours), into
// partial (parts, kSums, 2 * count).
template <int N, bool kChannelsLast, int kSums, int kOwn>
__device__ __forceinline__ void put_sums(const Unit& u, const Lane& lane,
                                         const float (&sums)[kOwn][2][kSums], float* partial) {
  constexpr int kWriters = kChannelsLast ? kLanes : 1;
#pragma unroll
  for (int e = 0; e < kOwn; ++e) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        const float sum = warp_sum(sums[e][h][k], kWriters);
        if (threadIdx.x % 32 < kWriters && lane.j + e < u.count) {
          partial[((lane.part * kSums + k) * 2 + h) * u.count + lane.j + e] = sum;
        }
      }
    }
  }
}

template <int kSums>
__device__ __forceinline__ float sum_of_parts(const Unit& u, const float* partial, int k, int j) {
  float sum = 0.f;
  for (int part = 0; part < u.parts; ++part) sum += partial[(part * kSums + k) * 2 * u.count + j];
  return sum;
}

// Calls finish(group, sums) by one lane for each group of the unit; add(j, sums) adds what a
// channel gives.
template <int kSums, class Add, class Finish>
__device__ __forceinline__ void for_each_group(const Unit& u, const Add& add,
                                               const Finish& finish) {
  const int lane = threadIdx.x % 32;
  for (int group = threadIdx.x / 32; group < u.groups; group += kWarps) {
    float sums[kSums] = {};
    for (int i = lane; i < u.size; i += 32) add(group * u.size + i, sums);
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] = warp_sum(sums[k]);
    if (lane == 0) finish(group, sums);
  }
}

// 1 / the sum of the weights, by one warp.
__device__ __forceinline__ float inverse_sum(const float* weight, int channels) {
  float sum = 0.f;
  for (int c = threadIdx.x % 32; c < channels; c += 32) sum += weight[c];
  return 1.f / warp_sum(sum);
}

}  // namespace kernelpose::cuda
