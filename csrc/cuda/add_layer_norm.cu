// Residual addition and LayerNorm: a row is read once, kept in the registers of its lanes, and
// written.
//
// N elements are 16 bytes of the sum; a row has 4 to 32 lanes, each with up to V vectors:
//
//   row 0 | lane 0: N | lane 1: N | ... | lane 0: N | lane 1: N | ...
//   row 1 | the next lanes of the same warp, where rows are short
//
// Rows of more than the widest V, or of no whole vectors, have a block each, which goes over them
// three times (V = 0). Backward, a block takes many rows, and each thread adds up what its columns
// give to the parameters: in shared memory of its own, or, with V = 0, in the block's part of the
// workspace. No atomics: one order of sums.
//
// Floor: two tensors read and two written, at 64 x 192 tokens of 768 in half 75 MB, 25 us of an
// H100's memory; backward three read and one written, the same.
// budget: forward_kernel<*, 0> registers<=64
// budget: forward_kernel<*, 3> registers<=80
// budget: forward_kernel<*, 6> registers<=128
// budget: forward_kernel<*, 10> registers<=104
// budget: backward_kernel<*, 0> registers<=64
// budget: backward_kernel<*, 3> registers<=128
// budget: backward_kernel<*, 6> registers<=168
// budget: backward_kernel<*, 10> registers<=168
#include "add_layer_norm.h"
#include "kernelpose/launch.cuh"
#include "kernelpose/numerics.cuh"
#include "kernelpose/vector.cuh"

namespace kernelpose::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kBlocks = 264;  // two for each SM of an H100, where there are rows enough

template <int N>
__device__ __forceinline__ void load_parameters(const void* from, DType type, int64_t at,
                                                float (&to)[N]) {
  if (type == DType::kFloat32) {
    constexpr int kPart = N < 4 ? N : 4;
#pragma unroll
    for (int i = 0; i < N; i += kPart) {
      const auto part = load_vector<kPart>(static_cast<const float*>(from) + at + i);
#pragma unroll
      for (int e = 0; e < kPart; ++e) to[i + e] = part.values[e];
    }
  } else if (type == DType::kFloat16) {
    const auto vector = load_vector<N>(static_cast<const __half*>(from) + at);
#pragma unroll
    for (int e = 0; e < N; ++e) to[e] = to_float(vector.values[e]);
  } else {
    const auto vector = load_vector<N>(static_cast<const __nv_bfloat16*>(from) + at);
#pragma unroll
    for (int e = 0; e < N; ++e) to[e] = to_float(vector.values[e]);
  }
}

// Which row a thread has, and which of its vectors. Threads without a row go on, for the sums.
template <int N, int V>
struct Place {
  static constexpr bool kHeld = V > 0;
  static constexpr int kSlots = kHeld ? V : 1;
  int lanes, lane, group;
  int64_t channels;

  __device__ __forceinline__ Place(int of_row, int64_t channels)
      : lanes(kHeld ? of_row : kThreads),
        lane(threadIdx.x % lanes),
        group(threadIdx.x / lanes),
        channels(channels) {}
  __device__ __forceinline__ int64_t row(int64_t block) const {
    return block * (blockDim.x / lanes) + group;
  }
  __device__ __forceinline__ int steps() const {
    if constexpr (kHeld) return V;
    return static_cast<int>((channels + lanes * N - 1) / (lanes * N));
  }
  __device__ __forceinline__ int64_t column(int step) const {
    return (static_cast<int64_t>(step) * lanes + lane) * N;
  }

  // The sum over a row's lanes, in all of them; `shared` holds kWarps floats, where a block has it.
  __device__ __forceinline__ float sum(float x, float* shared) const {
    for (int offset = (kHeld ? lanes : 32) / 2; offset >= 1; offset /= 2) {
      x += __shfl_xor_sync(0xffffffffu, x, offset);
    }
    if constexpr (!kHeld) {
      if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
      __syncthreads();
      x = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) x += shared[w];
      __syncthreads();
    }
    return x;
  }
};

template <class X, class T>
struct Forward {
  const X* x;
  const T* residual;
  const void* weight;
  const void* bias;
  T* sum;
  T* norm;
  float* moments;
  int64_t rows, channels;
  float eps;
  int lanes;
  DType parameters;
};

template <class X, class T, int N, int V>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Forward<X, T> op) {
  using Vector = ElementVector<T, N>;
  KP_DYNAMIC_SHARED(float, shared);  // kWarps, where V = 0
  const Place<N, V> place(op.lanes, op.channels);
  const int64_t row = place.row(blockIdx.x), at = row * op.channels;
  const int64_t end = row < op.rows ? op.channels : 0;  // of the columns it has
  Vector held[place.kSlots];
  float total = 0.f;
  const auto add = [&](int64_t c, const ElementVector<X, N>& x, Vector& residual) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const T sum = from_float<T>(to_float(x.values[e]) + to_float(residual.values[e]));
      residual.values[e] = sum;
      total += to_float(sum);
    }
    store_vector(op.sum + at + c, residual);
  };
  if constexpr (place.kHeld) {  // all reads are under way before the first write
    ElementVector<X, N> x[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (place.column(k) >= end) break;
      x[k] = load_vector<N>(op.x + at + place.column(k));
      held[k] = load_vector<N>(op.residual + at + place.column(k));
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (place.column(k) >= end) break;
      add(place.column(k), x[k], held[k]);
    }
  } else {
    for (int64_t c = place.column(0); c < end; c += place.lanes * N) {
      Vector residual = load_vector<N>(op.residual + at + c);
      add(c, load_vector<N>(op.x + at + c), residual);
    }
  }
  const float mean = place.sum(total, shared) / op.channels;
  float squares = 0.f;
#pragma unroll
  for (int k = 0; k < place.steps(); ++k) {
    const int64_t c = place.column(k);
    if (c >= end) break;
    const Vector own = place.kHeld ? held[k % place.kSlots] : load_vector<N>(op.sum + at + c);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float d = to_float(own.values[e]) - mean;
      squares += d * d;
    }
  }
  const float inverse = 1.f / sqrtf(place.sum(squares, shared) / op.channels + op.eps);
#pragma unroll
  for (int k = 0; k < place.steps(); ++k) {
    const int64_t c = place.column(k);
    if (c >= end) break;
    const Vector own = place.kHeld ? held[k % place.kSlots] : load_vector<N>(op.sum + at + c);
    float weight[N], bias[N];
    load_parameters<N>(op.weight, op.parameters, c, weight);
    load_parameters<N>(op.bias, op.parameters, c, bias);
    Vector norm;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float n = (to_float(own.values[e]) - mean) * inverse;
      norm.values[e] = from_float<T>(n * weight[e] + bias[e]);
    }
    store_vector(op.norm + at + c, norm);
  }
  if (op.moments && place.lane == 0 && row < op.rows) {
    op.moments[row] = mean;
    op.moments[op.rows + row] = inverse;
  }
}

template <class X, class T>
struct Backward {
  const T* grad_sum;
  const T* grad_norm;
  const T* sum;
  const float* moments;
  const void* weight;
  T* grad_residual;
  X* grad_x;
  float* parts;
  int64_t rows, channels;
  int lanes;
  DType parameters;
};

// Floats of shared memory: of each thread V vectors of both gradients, or those of its sums.
template <int N, int V>
constexpr int kShared = V > 0 ? kThreads * V * 2 * N : kWarps;

template <class X, class T, int N, int V>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Backward<X, T> op) {
  static_assert(kShared<N, V> * sizeof(float) <= 227 * 1024);
  using Vector = ElementVector<T, N>;
  constexpr bool kEarly = V > 0 && V * N <= 24;  // are there registers for the gradient of the sum?
  KP_DYNAMIC_SHARED(float, shared);              // (V, 2, N, kThreads), or kWarps
  const Place<N, V> place(op.lanes, op.channels);
  // Where this thread adds up: the gradient of weight (0) or bias (1) for its step's element e.
  float* const part = op.parts + static_cast<int64_t>(blockIdx.x) * 2 * op.channels;
  const auto slot = [&](int k, int64_t c, int which, int e) -> float& {
    if constexpr (place.kHeld) return shared[((k * 2 + which) * N + e) * kThreads + threadIdx.x];
    return part[which * op.channels + c + e];
  };
  for (int k = 0; k < place.steps(); ++k) {
    const int64_t c = place.column(k);
    if (c >= op.channels && !place.kHeld) break;
#pragma unroll
    for (int e = 0; e < N; ++e) slot(k, c, 0, e) = slot(k, c, 1, e) = 0.f;
  }
  const int64_t rows = kThreads / place.lanes;  // of the block, at a time
  for (int64_t block = blockIdx.x; block * rows < op.rows; block += gridDim.x) {
    const int64_t row = place.row(block), at = row * op.channels;
    const int64_t end = row < op.rows ? op.channels : 0;
    const float mean = end ? op.moments[row] : 0.f, inverse = end ? op.moments[op.rows + row] : 0.f;
    Vector grads[place.kSlots], sums[place.kSlots], given[place.kSlots];
    const auto load = [&](int64_t c, Vector& grad, Vector& sum) {
      grad = load_vector<N>(op.grad_norm + at + c);
      sum = load_vector<N>(op.sum + at + c);
    };
    if constexpr (place.kHeld) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (place.column(k) >= end) break;
        load(place.column(k), grads[k], sums[k]);
        if (kEarly && op.grad_sum) given[k] = load_vector<N>(op.grad_sum + at + place.column(k));
      }
    }
    float of_h = 0.f, of_hn = 0.f;
#pragma unroll
    for (int k = 0; k < place.steps(); ++k) {
      const int64_t c = place.column(k);
      if (c >= end) break;
      const int i = k % place.kSlots;
      if constexpr (!place.kHeld) load(c, grads[0], sums[0]);
      float weight[N];
      load_parameters<N>(op.weight, op.parameters, c, weight);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float h = to_float(grads[i].values[e]) * weight[e];
        of_h += h;
        of_hn += h * ((to_float(sums[i].values[e]) - mean) * inverse);
      }
    }
    const float mean_h = place.sum(of_h, shared) / op.channels;
    const float mean_hn = place.sum(of_hn, shared) / op.channels;
#pragma unroll
    for (int k = 0; k < place.steps(); ++k) {
      const int64_t c = place.column(k);
      if (c >= end) break;
      const int i = k % place.kSlots;
      if constexpr (!place.kHeld) load(c, grads[0], sums[0]);
      if (!kEarly && op.grad_sum) given[i] = load_vector<N>(op.grad_sum + at + c);
      float weight[N];
      load_parameters<N>(op.weight, op.parameters, c, weight);
      Vector result;
      ElementVector<X, N> result_x;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float g = to_float(grads[i].values[e]);
        const float n = (to_float(sums[i].values[e]) - mean) * inverse;
        float grad = (g * weight[e] - mean_h - n * mean_hn) * inverse;
        if (op.grad_sum) grad += to_float(given[i].values[e]);
        result.values[e] = from_float<T>(grad);
        result_x.values[e] = from_float<X>(grad);
        slot(k, c, 0, e) += g * n;
        slot(k, c, 1, e) += g;
      }
      store_vector(op.grad_residual + at + c, result);
      if constexpr (!std::is_same_v<X, T>) store_vector(op.grad_x + at + c, result_x);
    }
  }
  if constexpr (place.kHeld) {
    __syncthreads();
    for (int64_t c = threadIdx.x; c < op.channels; c += kThreads) {
      const int vector = static_cast<int>(c / N), e = static_cast<int>(c % N);
      const int k = vector / place.lanes, lane = vector % place.lanes;
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        float sum = 0.f;
        for (int t = lane; t < kThreads; t += place.lanes) {
          sum += shared[((k * 2 + which) * N + e) * kThreads + t];
        }
        part[which * op.channels + c] = sum;
      }
    }
  }
}

// How rows are laid on lanes, in vectors of `width` elements.
struct Layout {
  int lanes, vectors;  // of a row; of a lane, 0 for rows that a block goes over

  Layout(int64_t channels, int width) : lanes(32) {
    const int64_t all = (channels + width - 1) / width;
    while (lanes > 4 && all <= lanes / 2 * 3) lanes /= 2;
    const int64_t own = (all + lanes - 1) / lanes;
    vectors = own <= 3 ? 3 : own <= 6 ? 6 : own <= 10 && width == 4 ? 10 : 0;
    if (vectors == 0) lanes = kThreads;
  }
};

int width_of(DType type) { return type == DType::kFloat32 ? 4 : 8; }

// run(element of x, element of sum).
template <class Run>
cudaError_t with_elements(const AddLayerNormTypes& types, const Run& run) {
  if (types.parameters == DType::kFloat64) return cudaErrorInvalidValue;
  const DType x = types.x, sum = types.sum;
  if (sum == DType::kFloat32) {
    if (x == DType::kFloat32) return run(float{}, float{});
    if (x == DType::kFloat16) return run(__half{}, float{});
    if (x == DType::kBFloat16) return run(__nv_bfloat16{}, float{});
  }
  if (x == DType::kFloat16 && sum == x) return run(__half{}, __half{});
  if (x == DType::kBFloat16 && sum == x) return run(__nv_bfloat16{}, __nv_bfloat16{});
  return cudaErrorInvalidValue;
}

// run(N, V) as std::integral_constant.
template <class T, class Run>
cudaError_t with_layout(bool wide, const Layout& layout, const Run& run) {
  constexpr std::integral_constant<int, kWidestVector<T>> n;
  constexpr std::integral_constant<int, 0> none;
  if (!wide) return run(std::integral_constant<int, 1>{}, none);
  switch (layout.vectors) {
    case 3:
      return run(n, std::integral_constant<int, 3>{});
    case 6:
      return run(n, std::integral_constant<int, 6>{});
    case 10:  // not of 16-bit elements, of which registers would have to hold twice as many
      if constexpr (n == 4) return run(n, std::integral_constant<int, 10>{});
      [[fallthrough]];
    default:
      return run(n, none);
  }
}

// Whether rows are made of vectors of 16 bytes, wherever these begin.
bool is_wide(const AddLayerNormShape& shape, DType type,
             std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return shape.channels % width_of(type) == 0;
}

int64_t blocks_of(int64_t rows, int lanes, int threads) {
  const int64_t of_block = threads / lanes;
  return (rows + of_block - 1) / of_block;
}

}  // namespace

cudaError_t add_layer_norm_forward(const void* x, const void* residual, const void* weight,
                                   const void* bias, void* sum, void* norm, float* moments,
                                   const AddLayerNormShape& shape, const AddLayerNormTypes& types,
                                   cudaStream_t stream) {
  const bool wide = is_wide(shape, types.sum, {x, residual, weight, bias, sum, norm});
  const Layout layout(shape.channels, width_of(types.sum));
  const int lanes = wide ? layout.lanes : kThreads;
  int threads = kThreads;  // fewer, where there are so few rows
  while (threads > std::max(lanes, 32) && blocks_of(shape.rows, lanes, threads) < kBlocks) {
    threads /= 2;
  }
  const int64_t blocks = blocks_of(shape.rows, lanes, threads);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return with_elements(types, [&](auto of_x, auto of_sum) {
    using X = decltype(of_x);
    using T = decltype(of_sum);
    const Forward<X, T> op{
        static_cast<const X*>(x), static_cast<const T*>(residual), weight,  bias,
        static_cast<T*>(sum),     static_cast<T*>(norm),           moments, shape.rows,
        shape.channels,           static_cast<float>(shape.eps),   lanes,   types.parameters};
    return with_layout<T>(wide, layout, [&](auto n, auto v) {
      return launch(forward_kernel<X, T, n, v>, dim3(static_cast<unsigned>(blocks)), dim3(threads),
                    v ? 0 : kWarps * sizeof(float), stream, op);
    });
  });
}

int64_t add_layer_norm_parts(const AddLayerNormShape& shape, const AddLayerNormTypes& types) {
  const Layout layout(shape.channels, width_of(types.sum));
  return std::min<int64_t>(blocks_of(shape.rows, layout.lanes, kThreads), kBlocks);
}

cudaError_t add_layer_norm_backward(const void* grad_sum, const void* grad_norm, const void* sum,
                                    const float* moments, const void* weight, void* grad_residual,
                                    void* grad_x, float* parts, const AddLayerNormShape& shape,
                                    const AddLayerNormTypes& types, cudaStream_t stream) {
  const bool wide =
      is_wide(shape, types.sum, {grad_sum, grad_norm, sum, weight, grad_residual, grad_x});
  const Layout layout(shape.channels, width_of(types.sum));
  const auto blocks = static_cast<unsigned>(add_layer_norm_parts(shape, types));
  return with_elements(types, [&](auto of_x, auto of_sum) {
    using X = decltype(of_x);
    using T = decltype(of_sum);
    const Backward<X, T> op{static_cast<const T*>(grad_sum),
                            static_cast<const T*>(grad_norm),
                            static_cast<const T*>(sum),
                            moments,
                            weight,
                            static_cast<T*>(grad_residual),
                            static_cast<X*>(grad_x),
                            parts,
                            shape.rows,
                            shape.channels,
                            layout.lanes,
                            types.parameters};
    return with_layout<T>(wide, layout, [&](auto n, auto v) {
      return launch(backward_kernel<X, T, n, v>, dim3(blocks), dim3(kThreads),
                    kShared<n, v> * sizeof(float), stream, op);
    });
  });
}

}  // namespace kernelpose::cuda
