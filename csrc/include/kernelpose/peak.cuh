// The largest of many numbers and the first place that holds it.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "kernelpose/numerics.cuh"
#include "kernelpose/vector.cuh"

namespace kernelpose {

// Of the numbers that a thread, a warp or a block has seen.
struct Peak {
  float value = -INFINITY;  // without NaN
  int place = 0;
  bool nan = false;

  __device__ __forceinline__ void see(float number, int at) {  // in rising order of places
    nan |= number != number;
    if (number > value) {
      value = number;
      place = at;
    }
  }

  __device__ __forceinline__ void merge(float other_value, int other_place) {
    if (other_value > value || (other_value == value && other_place < place)) {
      value = other_value;
      place = other_place;
    }
  }
};

// Shows `peak` this thread's share of `count` numbers, vectors of N of them, kUnroll loads in
// flight at a time. `count` is a multiple of N, and `numbers` aligned to such a vector.
template <int N, int kThreads, int kUnroll, class T>
__device__ __forceinline__ void scan(Peak& peak, const T* numbers, int count, int thread) {
  for (int start = 0; start < count; start += kThreads * N * kUnroll) {
    ElementVector<T, N> vectors[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int place = start + (u * kThreads + thread) * N;
      if (place < count) vectors[u] = load_vector<N>(numbers + place);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int place = start + (u * kThreads + thread) * N;
      if (place >= count) break;
#pragma unroll
      for (int i = 0; i < N; ++i) peak.see(to_float(vectors[u].values[i]), place + i);
    }
  }
}

// Makes the peaks of a warp's lanes one, the same in all of them.
__device__ __forceinline__ void merge_lanes(Peak& peak) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float value = __shfl_xor_sync(0xffffffffu, peak.value, step);
    const int place = __shfl_xor_sync(0xffffffffu, peak.place, step);
    peak.merge(value, place);
  }
  peak.nan = __any_sync(0xffffffffu, peak.nan);
}

}  // namespace kernelpose
