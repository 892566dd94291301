// A block takes the map of one joint: height + width exponentials into shared memory, then one pass
// over the map in vectors of 16 bytes. The map of a joint of weight 0 is not read.
//
//   block m   columns |e e e e|      thread t: vectors t, t + 128, ... of the map
//             rows    |e e e e|      difference = map[y][x] - rows[y] * columns[x]
//
// Forward: a block's sum goes to sums[m]; one more block adds these up. Each sum has one order, the
// same on every run. Floor, per launch: the maps that count are read once, and written once by the
// backward kernel: at 64 x 17 maps of 64 x 48 in half 6.7 MB each way, 2 us of an H100's memory.
// Shared memory: 4 * (height + width) bytes and kWarps sums.
// budget: squared_error_kernel<*> registers<=48
// budget: gradient_kernel<*> registers<=48
// budget: mean_kernel registers<=32
#include <cstdint>
#include <type_traits>

#include "heatmap_loss.h"
#include "kernelpose/launch.cuh"
#include "kernelpose/numerics.cuh"
#include "kernelpose/ptx.cuh"

namespace kernelpose::cuda {
namespace {

// 10 blocks of 4 warps on a multiprocessor: the 1088 maps of a usual batch run at once on an H100.
constexpr int kThreads = 128, kWarps = kThreads / 32, kBlocks = 10;
constexpr int kBatch = 3;  // loads that a thread has under way: its whole share of 64 x 48 in half
constexpr int kSumThreads = 1024;

template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
  T values[kCount];
};

struct Problem {
  GaussianTargets<float> targets;
  const float* keypoints;
  const float* visible;
  int height, width;

  __device__ __forceinline__ int64_t map_elements() const { return int64_t{1} * height * width; }
  __device__ __forceinline__ Joint<float> joint(int64_t map) const {
    return targets.joint(keypoints + 2 * map, visible[map]);
  }
};

__device__ __forceinline__ void fill_profile(const Profile<float>& profile, float exponent,
                                             int size, float* to) {
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const float pixel = static_cast<float>(i), offset = (pixel - profile.origin) - profile.shift;
    to[i] = profile.covers(pixel) ? exp2_approx(exponent * offset * offset) : 0.f;
  }
}

// The columns' profile, then the rows'. A barrier has passed when it returns.
__device__ __forceinline__ void fill_profiles(const Problem& problem, const Joint<float>& joint,
                                              float* profiles) {
  fill_profile(joint.x, problem.targets.exponent, problem.width, profiles);
  fill_profile(joint.y, problem.targets.exponent, problem.height, profiles + problem.width);
  __syncthreads();
}

// Calls use(vector index, difference[kCount]) for the block's share of vectors of kCount neighbours
// in a row of the map.
template <class T, int kCount, class Use>
__device__ __forceinline__ void for_differences(const T* map, const Problem& problem,
                                                const float* profiles, Use use) {
  using Vector = Pack<T, kCount>;
  const unsigned row_vectors = problem.width / kCount;
  const unsigned vectors = row_vectors * problem.height;
  const float* const rows = profiles + problem.width;
  for (unsigned first = threadIdx.x; first < vectors; first += kBatch * kThreads) {
    Vector values[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const unsigned i = first + b * kThreads;
      if (i < vectors) values[b] = reinterpret_cast<const Vector*>(map)[i];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const unsigned i = first + b * kThreads;
      if (i >= vectors) continue;
      const unsigned y = i / row_vectors, x = (i - y * row_vectors) * kCount;
      float difference[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        difference[j] = to_float(values[b].values[j]) - rows[y] * profiles[x + j];
      }
      use(i, difference);
    }
  }
}

// Sum over the block, in thread 0. `partial` holds a number for each warp.
template <int kBlockWarps>
__device__ __forceinline__ float block_sum(float x, float* partial) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.f;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kBlockWarps; ++i) sum += partial[i];
  }
  return sum;
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocks)
    squared_error_kernel(const T* __restrict__ pred, float* sums, const Problem problem) {
  KP_DYNAMIC_SHARED(float, shared);  // kWarps sums, profiles
  const int64_t map = blockIdx.x;
  const Joint<float> joint = problem.joint(map);
  if (joint.weight == 0.f) {
    if (threadIdx.x == 0) sums[map] = 0.f;
    return;
  }
  fill_profiles(problem, joint, shared + kWarps);
  float sum = 0.f;
  for_differences<T, kCount>(pred + map * problem.map_elements(), problem, shared + kWarps,
                             [&](unsigned, const float (&difference)[kCount]) {
#pragma unroll
                               for (float d : difference) sum += d * d;
                             });
  sum = block_sum<kWarps>(sum, shared);
  if (threadIdx.x == 0) sums[map] = joint.weight * sum;
}

__global__ void __launch_bounds__(kSumThreads)
    mean_kernel(const float* sums, int64_t count, float factor, float* total) {
  KP_DYNAMIC_SHARED(float, shared);  // a sum a warp
  float sum = 0.f;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += sums[i];
  sum = block_sum<kSumThreads / 32>(sum, shared);
  if (threadIdx.x == 0) *total = factor * sum;
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradient_kernel(const float* grad_loss, const T* __restrict__ pred, T* __restrict__ grad_pred,
                    float scale, const Problem problem) {
  KP_DYNAMIC_SHARED(float, profiles);
  using Vector = Pack<T, kCount>;
  const int64_t map = blockIdx.x;
  const Joint<float> joint = problem.joint(map);
  Vector* const to = reinterpret_cast<Vector*>(grad_pred + map * problem.map_elements());
  if (joint.weight == 0.f) {
    Vector zeros;
#pragma unroll
    for (T& value : zeros.values) value = from_float<T>(0.f);
    const unsigned vectors = problem.width / kCount * problem.height;
    for (unsigned i = threadIdx.x; i < vectors; i += kThreads) to[i] = zeros;
    return;
  }
  fill_profiles(problem, joint, profiles);
  const float factor = scale * *grad_loss * joint.weight;
  for_differences<T, kCount>(pred + map * problem.map_elements(), problem, profiles,
                             [&](unsigned i, const float (&difference)[kCount]) {
                               Vector values;
#pragma unroll
                               for (int j = 0; j < kCount; ++j) {
                                 values.values[j] = from_float<T>(factor * difference[j]);
                               }
                               to[i] = values;
                             });
}

Problem problem_of(const HeatmapLossShape& shape, const float* keypoints, const float* visible) {
  return {GaussianTargets<float>(shape), keypoints, visible, shape.height, shape.width};
}

double elements_of(const HeatmapLossShape& shape) {
  return double(shape.maps) * double(shape.map_elements());
}

size_t profile_bytes(const HeatmapLossShape& shape) {
  return (size_t{1} * shape.height + shape.width) * sizeof(float);
}

// Runs run(element, length) with the elements' type and the longest vectors that rows and
// addresses allow.
template <class Run>
cudaError_t dispatch(const HeatmapLossShape& shape, DType dtype, const void* a, const void* b,
                     Run run) {
  const bool aligned = (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
  const auto with = [&](auto element) {
    constexpr int kLength = 16 / sizeof(element);
    if (aligned && shape.width % kLength == 0) {
      return run(element, std::integral_constant<int, kLength>{});
    }
    return run(element, std::integral_constant<int, 1>{});
  };
  switch (dtype) {
    case DType::kFloat32:
      return with(float{});
    case DType::kFloat16:
      return with(__half{});
    case DType::kBFloat16:
      return with(__nv_bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

size_t heatmap_loss_forward_workspace(const HeatmapLossShape& shape) {
  return shape.maps * sizeof(float);
}

cudaError_t heatmap_loss_forward(const void* pred, const float* keypoints, const float* visible,
                                 float* loss, float* sums, const HeatmapLossShape& shape,
                                 DType dtype, cudaStream_t stream) {
  const cudaError_t error = dispatch(shape, dtype, pred, nullptr, [&](auto element, auto length) {
    using T = decltype(element);
    return launch(squared_error_kernel<T, length.value>, dim3(shape.maps), dim3(kThreads),
                  profile_bytes(shape) + kWarps * sizeof(float), stream,
                  static_cast<const T*>(pred), sums, problem_of(shape, keypoints, visible));
  });
  if (error != cudaSuccess) return error;
  return launch(mean_kernel, dim3(1), dim3(kSumThreads), kSumThreads / 32 * sizeof(float), stream,
                static_cast<const float*>(sums), shape.maps,
                static_cast<float>(1 / elements_of(shape)), loss);
}

cudaError_t heatmap_loss_backward(const float* grad_loss, const void* pred, const float* keypoints,
                                  const float* visible, void* grad_pred,
                                  const HeatmapLossShape& shape, DType dtype, cudaStream_t stream) {
  return dispatch(shape, dtype, pred, grad_pred, [&](auto element, auto length) {
    using T = decltype(element);
    return launch(gradient_kernel<T, length.value>, dim3(shape.maps), dim3(kThreads),
                  profile_bytes(shape), stream, grad_loss, static_cast<const T*>(pred),
                  static_cast<T*>(grad_pred), static_cast<float>(2 / elements_of(shape)),
                  problem_of(shape, keypoints, visible));
  });
}

}  // namespace kernelpose::cuda
