// The norms of cascaded_attention, and the reduction of a map before one of them.
#pragma once

#include "cascaded_attention_tiles.cuh"

namespace kernelpose::cuda {

// Two neighbouring elements.
template <class T>
__device__ __forceinline__ float2 load_pair(const T* p) {
  const ElementVector<T, 2> pair = load_vector<2>(p);
  return make_float2(to_float(pair.values[0]), to_float(pair.values[1]));
}

template <class T>
__device__ __forceinline__ void store_pair(T* p, float x, float y) {
  store_vector(p, ElementVector<T, 2>{{from_float<T>(x), from_float<T>(y)}});
}

// Mean and 1 / standard deviation of a row of which this lane holds values[j][2 * half] and the one
// after it for all j < tiles.
template <int N>
__device__ __forceinline__ float2 row_statistics(const float (&values)[N][4], int half, int tiles,
                                                 float eps) {
  const float width = 8.f * tiles;
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j < tiles) sum += values[j][2 * half] + values[j][2 * half + 1];
  }
  const float mean = row_sum(sum) / width;
  float squares = 0.f;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (j < tiles) {
      const float a = values[j][2 * half] - mean, b = values[j][2 * half + 1] - mean;
      squares = fmaf(a, a, fmaf(b, b, squares));
    }
  }
  return make_float2(mean, rsqrtf(row_sum(squares) / width + eps));
}

// rows = norm(rows + found), of a warp's 16; zeros past the width stay zeros.
template <class T, int D>
__device__ __forceinline__ void normalise(T* rows, const T* found, int tiles, float eps, int lane) {
  const int own = (lane >> 2) * kRowStride<T, D> + 2 * (lane & 3);
  float u[D / 8][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      const int at = own + 8 * half * kRowStride<T, D> + 8 * j;
      const float2 x = load_pair(rows + at), before = load_pair(found + at);
      u[j][2 * half] = to_float(from_float<T>(x.x + before.x));
      u[j][2 * half + 1] = to_float(from_float<T>(x.y + before.y));
    }
    const float2 norm = row_statistics(u, half, tiles, eps);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      if (j < tiles) {
        store_pair(rows + own + 8 * half * kRowStride<T, D> + 8 * j,
                   (u[j][2 * half] - norm.x) * norm.y, (u[j][2 * half + 1] - norm.x) * norm.y);
      }
    }
  }
}

// y = LN(y + bias) * weight + bias, of a warp's 16 rows; zeros past the width.
template <int D, class T>
__device__ __forceinline__ void finish_rows(float (&y)[D / 8][4], const CascadeStep<T>& step,
                                            int tiles, float eps, int lane) {
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    if (j < tiles) {
      const float2 bias = load_pair(step.out_bias + 8 * j + 2 * (lane & 3));
      y[j][0] += bias.x;
      y[j][1] += bias.y;
      y[j][2] += bias.x;
      y[j][3] += bias.y;
    }
  }
  const float2 upper = row_statistics(y, 0, tiles, eps), lower = row_statistics(y, 1, tiles, eps);
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    if (j < tiles) {
      const float2 weight = load_pair(step.norm_weight + 8 * j + 2 * (lane & 3));
      const float2 bias = load_pair(step.norm_bias + 8 * j + 2 * (lane & 3));
      y[j][0] = fmaf((y[j][0] - upper.x) * upper.y, weight.x, bias.x);
      y[j][1] = fmaf((y[j][1] - upper.x) * upper.y, weight.y, bias.y);
      y[j][2] = fmaf((y[j][2] - lower.x) * lower.y, weight.x, bias.x);
      y[j][3] = fmaf((y[j][3] - lower.x) * lower.y, weight.y, bias.y);
    }
  }
}

// The reduced places of a unit, from rows [first, first + kRows) of it: shares of the sums of a
// place, each a thread's own. N queries of a place at once.
template <int N, class T, int D>
__device__ __forceinline__ void add_places(const CascadeProblem& problem,
                                           const CascadeStep<T>& step, const CascadeUnit& unit,
                                           const T* rows, int first, float* sums) {
  constexpr int kThreads = Tile<T>::kThreads;
  const int items = unit.places * problem.width, shares = max(1, kThreads / items);
  for (int i = threadIdx.x; i < items * shares; i += kThreads) {
    const int share = i / items, place = i % items / problem.width, c = i % problem.width;
    const int start = place * problem.area;
    const int end = min(start + problem.area, first + Tile<T>::kRows);
    float sum = first == 0 ? 0.f : sums[i];
    for (int row = max(start, first) + share * N; row < end; row += shares * N) {
      const auto weights =
          load_vector<N>(step.reduce_weight + static_cast<int64_t>(c) * problem.area + row - start);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const T u = rows[(row - first + e) * kRowStride<T, D> + c];
        sum = fmaf(to_float(weights.values[e]), to_float(u), sum);
      }
    }
    sums[i] = sum;
  }
}

// reduced (16 x D) = norm of the places of a unit, zeros where there is none.
template <class T, int D>
__device__ __forceinline__ void finish_places(const CascadeProblem& problem,
                                              const CascadeStep<T>& step, const CascadeUnit& unit,
                                              const float* sums, T* reduced) {
  constexpr int kLaneColumns = (D + 31) / 32;
  const int lane = threadIdx.x & 31, width = problem.width;
  const int items = unit.places * width, shares = max(1, Tile<T>::kThreads / items);
  const auto total = [](float x) {
#pragma unroll
    for (int offset = 16; offset >= 1; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
  };
  for (int place = threadIdx.x >> 5; place < kUnitPlaces; place += Tile<T>::kWarps) {
    float s[kLaneColumns], sum = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const int c = lane + 32 * i;
      s[i] = 0.f;
      if (place < unit.places && c < width) {
        s[i] = to_float(step.reduce_bias[c]);
        for (int share = 0; share < shares; ++share)
          s[i] += sums[share * items + place * width + c];
      }
      sum += s[i];
    }
    const float mean = total(sum) / width;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      if (lane + 32 * i < width) squares = fmaf(s[i] - mean, s[i] - mean, squares);
    }
    const float deviation = rsqrtf(total(squares) / width + problem.eps);
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const int c = lane + 32 * i;
      if (c >= D) break;
      const bool exists = place < unit.places && c < width;
      reduced[place * kRowStride<T, D> + c] =
          from_float<T>(exists ? (s[i] - mean) * deviation : 0.f);
    }
  }
}

}  // namespace kernelpose::cuda
