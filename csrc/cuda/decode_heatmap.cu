// Heatmap decoding: a block a map, four steps.
//
//   arg-max      all threads, 16 bytes each, kUnroll loads in flight; the map is read once and is
//                in the L1 cache for what follows
//   blur near    a thread a sum: the rows around the peak, blurred along x, in shared memory; then
//                a lane of the first warp for each of the 9 or 25 pixels that the step reads
//   blur all     its maximum, in tiles of kTile x kTile pixels, rows in shared memory: only if the
//                clipping could tell the difference (DecodeHeatmap::never_clipped)
//   step         one thread
//
// Floor, per launch: the maps read once. Shared memory: less than 1 KiB, or where a map may be
// blurred 128 * (kTile + taps - 1) bytes more, 5 KiB for 11 taps.
// budget: decode_heatmap_kernel<*> registers<=48
#include <cstdint>

#include "decode_heatmap.h"
#include "kernelpose/launch.cuh"
#include "kernelpose/peak.cuh"

namespace kernelpose::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kUnroll = 3;  // a map of 64 x 48 is one round of 16-bit or two of 32-bit vectors
constexpr int kTile = 32;
constexpr unsigned kAll = 0xffffffffu;

struct Shared {
  Peak peaks[kWarps];
  float tops[kWarps];
  float near[kNear * kNear];
  float rows[1];  // row_numbers() of them

  static int row_numbers(const DecodeHeatmap& problem) {
    const int around = (2 * problem.reach() + problem.taps) * (2 * problem.reach() + 1);
    const int tile = problem.rescales() ? (kTile + problem.taps - 1) * kTile : 0;
    return around > tile ? around : tile;
  }
};

template <class T>
struct Arguments {
  const T* heatmaps;
  DecodedPoints out;
  DecodeHeatmap problem;
  bool aligned;
};

// The peak of the block's map, the same in all threads.
template <class T>
__device__ __forceinline__ Peak find_peak(const T* map, int pixels, bool aligned, Shared& shared) {
  const int thread = threadIdx.x;
  Peak peak;
  if (aligned) {
    scan<kWidestVector<T>, kThreads, kUnroll>(peak, map, pixels, thread);
  } else {
    scan<1, kThreads, kUnroll>(peak, map, pixels, thread);
  }
  merge_lanes(peak);
  if (thread % 32 == 0) shared.peaks[thread / 32] = peak;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    const Peak& other = shared.peaks[warp];
    peak.merge(other.value, other.place);
    peak.nan |= other.nan;
  }
  return peak;
}

// The map blurred along x at row, column, which may lie outside.
template <class T>
__device__ __forceinline__ float sum_along_x(const T* map, const DecodeHeatmap& problem, int row,
                                             int column) {
  const int y = problem.source(row, problem.height);
  if (y < 0) return 0.0f;
  const T* const line = map + y * problem.width;
  float sum = 0.0f;
  for (int k = 0; k < problem.taps; ++k) {
    const int x = problem.source(column - problem.radius() + k, problem.width);
    if (x >= 0) sum += to_float(line[x]) * problem.weights[k];
  }
  return sum;
}

// The blur along y of what sum_along_x gave, rows of `stride` numbers.
__device__ __forceinline__ float sum_along_y(const float* first, int stride,
                                             const DecodeHeatmap& problem) {
  float sum = 0.0f;
  for (int k = 0; k < problem.taps; ++k) sum += first[k * stride] * problem.weights[k];
  return sum;
}

// The largest number of the whole blurred map, the same in all threads. Begins to write
// shared.rows at once.
template <class T>
__device__ float blurred_maximum(const T* map, const DecodeHeatmap& problem, Shared& shared) {
  const int thread = threadIdx.x, radius = problem.radius();
  float top = -INFINITY;
  for (int first = 0; first < problem.height; first += kTile) {
    const int rows = min(kTile, problem.height - first);
    for (int left = 0; left < problem.width; left += kTile) {
      for (int i = thread; i < (rows + problem.taps - 1) * kTile; i += kThreads) {
        shared.rows[i] = sum_along_x(map, problem, first - radius + i / kTile, left + i % kTile);
      }
      __syncthreads();
      for (int i = thread; i < rows * kTile; i += kThreads) {
        if (left + i % kTile >= problem.width) continue;
        top = fmaxf(top, sum_along_y(shared.rows + i, kTile, problem));
      }
      __syncthreads();
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, step));
  if (thread % 32 == 0) shared.tops[thread / 32] = top;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) top = fmaxf(top, shared.tops[warp]);
  return top;
}

// Fills shared.near, for the first warp, with what the refinement of the peak at x, y reads.
template <class T>
__device__ __forceinline__ void read_near(const T* map, const DecodeHeatmap& problem, float peak,
                                          int x, int y, Shared& shared) {
  const int thread = threadIdx.x, reach = problem.reach(), side = 2 * reach + 1;
  const bool mine = thread < side * side;  // lanes of the first warp
  const int row = clamped(y + thread / side - reach, problem.height);
  const int column = clamped(x + thread % side - reach, problem.width);
  float value = 0.0f;
  if (!problem.blurs()) {
    if (mine) value = to_float(map[row * problem.width + column]);
  } else {
    const Window window = problem.around(x, y);
    for (int i = thread; i < (window.height + problem.taps - 1) * window.width; i += kThreads) {
      shared.rows[i] = sum_along_x(map, problem, window.top - problem.radius() + i / window.width,
                                   window.left + i % window.width);
    }
    __syncthreads();
    if (mine) {
      const int first = (row - window.top) * window.width + column - window.left;
      value = sum_along_y(shared.rows + first, window.width, problem);
    }
    if (problem.rescales()) {
      float factor = peak / __shfl_sync(kAll, value, side * side / 2);
      const bool enough = !mine || problem.never_clipped(value, factor);
      if (!__syncthreads_and(enough)) factor = peak / blurred_maximum(map, problem, shared);
      value *= factor;
    }
    value = logf(problem.clipped(value));
  }
  if (mine) shared.near[thread] = value;
  __syncwarp();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 10)
    decode_heatmap_kernel(const __grid_constant__ Arguments<T> args) {
  KP_DYNAMIC_SHARED(unsigned char, memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const DecodeHeatmap& problem = args.problem;
  const T* const map = args.heatmaps + int64_t{blockIdx.x} * problem.pixels();
  const Peak peak = find_peak(map, problem.pixels(), args.aligned, shared);
  const float maximum = peak.nan ? NAN : peak.value;
  Point location = {};
  if (is_peak(maximum)) {
    const int x = peak.place % problem.width, y = peak.place / problem.width;
    read_near(map, problem, maximum, x, y, shared);
    if (threadIdx.x == 0) {
      const int reach = problem.reach(), side = 2 * reach + 1;
      const Point step = refinement(problem, x, y, [&](int dx, int dy) {
        return shared.near[(dy + reach) * side + dx + reach];
      });
      location = {static_cast<float>(x) + step.x, static_cast<float>(y) + step.y};
    }
  }
  if (threadIdx.x == 0) args.out.write(problem, blockIdx.x, maximum, location);
}

template <class T>
cudaError_t decode(const void* heatmaps, const DecodedPoints& out, const DecodeHeatmap& problem,
                   cudaStream_t stream) {
  if (problem.maps() > INT32_MAX) return cudaErrorInvalidValue;
  const bool aligned =
      reinterpret_cast<uintptr_t>(heatmaps) % 16 == 0 && problem.pixels() % kWidestVector<T> == 0;
  const Arguments<T> args = {static_cast<const T*>(heatmaps), out, problem, aligned};
  const size_t bytes = sizeof(Shared) + sizeof(float) * Shared::row_numbers(problem);
  return launch(decode_heatmap_kernel<T>, dim3(static_cast<unsigned>(problem.maps())),
                dim3(kThreads), bytes, stream, args);
}

}  // namespace

cudaError_t decode_heatmap(const void* heatmaps, const DecodedPoints& out,
                           const DecodeHeatmap& problem, DType dtype, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat32:
      return decode<float>(heatmaps, out, problem, stream);
    case DType::kFloat16:
      return decode<__half>(heatmaps, out, problem, stream);
    case DType::kBFloat16:
      return decode<__nv_bfloat16>(heatmaps, out, problem, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace kernelpose::cuda
