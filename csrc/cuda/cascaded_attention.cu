// Groups of channels in a cascade: a launch that makes the first group's keys and values, and one a
// group that attends and makes the next group's. A block has all queries that its places of the
// reduced map are made of, so what it found need not be read again for them.
//
// Keys and values of an image are wanted by all its queries, which is why the groups are launches
// and not one loop: groups + 1 of them. A cooperative launch of the whole cascade would save
// `groups` launches, about 4 microseconds each outside a CUDA graph and 1 to 2 inside, and would
// read x once instead of twice; but it takes no more units than the GPU has room for at once, 8
// images of the first stage (64 units each, 4 blocks a multiprocessor), so that both would be
// needed. A cluster an image would need its 64 units in 16 blocks at most.
//
// Floor, of a launch: x read twice (for this group and the next), the last result read and the new
// one written, 4 * tokens * d * sizeof(T) bytes an image. The weights, 5 * d^2, and an image's keys
// and values are read by every block, from L2. Shared memory: 5 * kRows * (D + 16 bytes), and the
// sums; 73 KB for D = 96, 36 KB for D = 48, 16-bit elements.
// budget: cascade_kernel<16-bit, 32> registers<=128
// budget: cascade_kernel<16-bit, 48> registers<=128
// budget: cascade_kernel<16-bit, 64> registers<=168
// budget: cascade_kernel<16-bit, 96> registers<=168
// budget: cascade_kernel<16-bit, 128> registers<=224
// budget: cascade_kernel<float, 32> registers<=168
// budget: cascade_kernel<float, 48> registers<=168
// budget: cascade_kernel<float, 64> registers<=168
// budget: cascade_kernel<float, 96> registers<=255
// budget: cascade_kernel<float, 128> registers<=255
#include <algorithm>

#include "cascaded_attention.h"
#include "cascaded_attention_step.cuh"

namespace kernelpose::cuda {
namespace {

CascadeProblem make_problem(const CascadedAttentionShape& shape, int rows) {
  const int area = shape.ratio * shape.ratio, keys = shape.keys();
  const int head_dim = shape.head_dim();
  const int places = std::min(std::clamp(rows / area, 1, kUnitPlaces), keys);
  return {shape.queries(),
          shape.channels(),
          shape.width,
          shape.ratio,
          area,
          shape.width / shape.ratio,
          keys,
          shape.group_width,
          shape.heads,
          head_dim,
          (head_dim + 15) / 16 * 16,
          places,
          (keys + places - 1) / places,
          kLog2E / std::sqrt(static_cast<float>(head_dim)),
          static_cast<float>(shape.eps)};
}

// Bytes of the keys and values of a group.
int64_t keys_values_size(const CascadedAttentionShape& shape, DType dtype) {
  const CascadeProblem problem = make_problem(shape, 1);
  const int64_t bytes = shape.batch * problem.keys * 2 * problem.span() * element_size(dtype);
  return ceil_div(bytes, 256) * 256;
}

template <class T, int D>
cudaError_t launch_step(const CascadeProblem& problem, const CascadeStep<T>& step, int64_t batch,
                        cudaStream_t stream) {
  constexpr int kMostSums = kUnitPlaces * D * static_cast<int>(sizeof(float));
  constexpr int kElements = kCascadeElements<T, D> * static_cast<int>(sizeof(T));
  static_assert(kElements + kMostSums <= kSharedLimit);
  const int sums = std::max(problem.places * problem.width, Tile<T>::kThreads);
  return launch_blocks(cascade_kernel<T, D>, batch * problem.units, Tile<T>::kThreads,
                       kElements + sums * static_cast<int>(sizeof(float)), stream, problem, step);
}

template <class T, int D>
cudaError_t launch_all(const CascadedAttentionTensors& tensors, void* workspace,
                       const CascadedAttentionShape& shape, DType dtype, cudaStream_t stream) {
  const CascadeProblem problem = make_problem(shape, Tile<T>::kRows);
  const int64_t d = shape.group_width;
  // What group i has of a tensor of so many elements a group.
  const auto of = [](const void* tensor, int64_t i, int64_t elements) {
    return static_cast<const T*>(tensor) + i * elements;
  };
  const auto keys_values = [&](int i) {
    return reinterpret_cast<T*>(static_cast<char*>(workspace) +
                                i % 2 * keys_values_size(shape, dtype));
  };
  T* const out = static_cast<T*>(tensors.out);
  for (int i = -1; i < shape.groups; ++i) {
    CascadeStep<T> step = {};
    if (i >= 0) {
      step.x = of(tensors.x, i, d);
      step.before = i == 0 ? nullptr : out + (i - 1) * d;
      step.found = out + i * d;
      step.q_weight = of(tensors.q_weight, i, d * d);
      step.q_bias = of(tensors.q_bias, i, d);
      step.keys_values = keys_values(i);
      step.out_weight = of(tensors.out_weight, i, d * d);
      step.out_bias = of(tensors.out_bias, i, d);
      step.norm_weight = of(tensors.norm_weight, i, d);
      step.norm_bias = of(tensors.norm_bias, i, d);
    }
    const int next = i + 1;
    step.legal = of(tensors.x, 0, d);
    if (next < shape.groups) {
      step.next_x = of(tensors.x, next, d);
      step.reduce_weight = of(tensors.reduce_weight, next, d * problem.area);
      step.reduce_bias = of(tensors.reduce_bias, next, d);
      step.kv_weight = of(tensors.kv_weight, next, 2 * d * d);
      step.kv_bias = of(tensors.kv_bias, next, 2 * d);
      step.next_keys_values = keys_values(next);
    }
    const cudaError_t error = launch_step<T, D>(problem, step, shape.batch, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class T, class... A>
cudaError_t dispatch_group(int width, const A&... args) {
  if (width <= 32) return launch_all<T, 32>(args...);
  if (width <= 48) return launch_all<T, 48>(args...);
  if (width <= 64) return launch_all<T, 64>(args...);
  if (width <= 96) return launch_all<T, 96>(args...);
  return launch_all<T, 128>(args...);
}

bool possible(const CascadedAttentionTensors& tensors, const CascadedAttentionShape& shape) {
  for (const void* p :
       {tensors.x, tensors.reduce_weight, tensors.reduce_bias, tensors.q_weight, tensors.q_bias,
        tensors.kv_weight, tensors.kv_bias, tensors.out_weight, tensors.out_bias,
        tensors.norm_weight, tensors.norm_bias, static_cast<const void*>(tensors.out)}) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  const int64_t tokens = static_cast<int64_t>(shape.height) * shape.width;
  return shape.group_width % 8 == 0 && shape.group_width <= 128 && shape.ratio < 256 &&
         tokens < (1 << 30);
}

}  // namespace

int64_t cascaded_attention_workspace(const CascadedAttentionShape& shape, DType dtype) {
  return 2 * keys_values_size(shape, dtype);
}

cudaError_t cascaded_attention_forward(const CascadedAttentionTensors& tensors, void* workspace,
                                       const CascadedAttentionShape& shape, DType dtype,
                                       cudaStream_t stream) {
  if (shape.batch == 0) return cudaSuccess;
  if (!possible(tensors, shape)) return cudaErrorInvalidValue;
  const int width = shape.group_width;
  switch (dtype) {
    case DType::kFloat32:
      return dispatch_group<float>(width, tensors, workspace, shape, dtype, stream);
    case DType::kFloat16:
      return dispatch_group<__half>(width, tensors, workspace, shape, dtype, stream);
    case DType::kBFloat16:
      return dispatch_group<__nv_bfloat16>(width, tensors, workspace, shape, dtype, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace kernelpose::cuda
