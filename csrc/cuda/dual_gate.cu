// The sum of a channel gate and a spatial gate: a pass that reduces rows and columns together, a
// block an image that makes the gates of it, and a pass that applies them.
//
// Floor: y read and out written once, at 64 maps of 768 x 16 x 12 in half 38 MB, 13 us of an H100's
// memory; backward y and grad_out read and grad_y written, 57 MB, 19 us. The second reading comes
// from L2, which holds such a batch.
// budget: reduce_table<*> registers<=80
// budget: write_table<*> registers<=80
// budget: make_gates registers<=64
// budget: turn_back_gates registers<=64
#include <cmath>

#include "dual_gate.h"
#include "kernelpose/channel_passes.cuh"
#include "kernelpose/table.cuh"

namespace kernelpose::cuda {
namespace {

using channel_passes::warp_sum;
using table::kThreads, table::kWarps, table::Table;

constexpr float kInfinity = __builtin_huge_valf();

// Where the numbers of an image lie in its state; [0] the channels', [1] the pixels'. Those of the
// next image lie `stride` further on.
template <class T>
struct State {
  T* means[2];
  T* largest[2];
  T* gates[2];
  T* hidden;
  int64_t stride;

  KP_HOST_DEVICE State(T* at, const DualGateShape& shape, int64_t image = 0)
      : stride(shape.state()) {
    const int64_t channels = shape.maps.channels, pixels = shape.maps.pixels;
    at += image * stride;
    means[0] = at;
    largest[0] = at + channels;
    means[1] = at + 2 * channels;
    largest[1] = means[1] + pixels;
    gates[0] = largest[1] + pixels;
    gates[1] = gates[0] + channels;
    hidden = gates[1] + pixels;
  }
};

// What the backward pass multiplies with, in the workspace: see Gradient.
struct Factors {
  float* of_mean[2];
  float* of_largest[2];
  float* of_sigmoids;  // of the pixels
  int64_t stride;

  static KP_HOST_DEVICE int64_t size(const DualGateShape& shape) {
    return 2 * shape.maps.channels + 3 * shape.maps.pixels;
  }
  KP_HOST_DEVICE Factors(float* at, const DualGateShape& shape, int64_t image = 0)
      : stride(size(shape)) {
    const int64_t channels = shape.maps.channels, pixels = shape.maps.pixels;
    at += image * stride;
    of_mean[0] = at;
    of_largest[0] = at + channels;
    of_mean[1] = at + 2 * channels;
    of_largest[1] = of_mean[1] + pixels;
    of_sigmoids = of_largest[1] + pixels;
  }
};

__device__ __forceinline__ float relu(float x) { return x < 0.f ? 0.f : x; }  // keeps NaN
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// Sum and largest.
template <class T>
struct Peaks {
  using Element = T;
  struct Known {};
  static constexpr int kInputs = 1;
  static constexpr float kStart = -kInfinity;
  Maps maps;
  const T* inputs[1];  // y
  float* columns;
  float* row_means;
  float* row_largest;
  int64_t stride;  // of the state

  Peaks(const DualGateShape& shape, const T* y, float* workspace, float* states)
      : maps(shape.maps), inputs{y}, columns(workspace) {
    const State<float> state(states, shape);
    row_means = state.means[maps.channels_last];
    row_largest = state.largest[maps.channels_last];
    stride = state.stride;
  }
  static __device__ __forceinline__ float join(float a, float b) { return fmaxf(a, b); }
  __device__ __forceinline__ Known row(int64_t, int64_t) const { return {}; }
  __device__ __forceinline__ Known column(int64_t, int64_t) const { return {}; }
  __device__ __forceinline__ void place(const float (&y)[1], Known, Known, float (&row)[2],
                                        float (&column)[2]) const {
    row[0] += y[0];
    row[1] = fmaxf(row[1], y[0]);
    column[0] += y[0];
    column[1] = fmaxf(column[1], y[0]);
  }
  __device__ __forceinline__ void finish(int64_t image, int64_t r, const float (&of)[2]) const {
    row_means[image * stride + r] = of[0] / (maps.channels_last ? maps.channels : maps.pixels);
    row_largest[image * stride + r] = of[1];
  }
};

// Sum of grad_out y, and how many values are as large as the largest.
template <class T>
struct Shares {
  using Element = T;
  using Known = float;  // the largest
  static constexpr int kInputs = 2;
  static constexpr float kStart = 0.f;
  Maps maps;
  const T* inputs[2];  // grad_out, y
  float* columns;
  const float* row_largest;
  const float* column_largest;
  int64_t stride;  // of the state
  float* row_sums;
  float* row_counts;
  int64_t factors_stride;

  Shares(const DualGateShape& shape, const T* grad_out, const T* y, float* workspace,
         const float* states, float* factors)
      : maps(shape.maps), inputs{grad_out, y}, columns(workspace) {
    const State<const float> state(states, shape);
    const Factors f(factors, shape);
    row_largest = state.largest[maps.channels_last];
    column_largest = state.largest[!maps.channels_last];
    stride = state.stride;
    row_sums = f.of_mean[maps.channels_last];
    row_counts = f.of_largest[maps.channels_last];
    factors_stride = f.stride;
  }
  static __device__ __forceinline__ float join(float a, float b) { return a + b; }
  __device__ __forceinline__ Known row(int64_t image, int64_t r) const {
    return row_largest[image * stride + r];
  }
  __device__ __forceinline__ Known column(int64_t image, int64_t c) const {
    return column_largest[image * stride + c];
  }
  __device__ __forceinline__ void place(const float (&in)[2], Known of_row, Known of_column,
                                        float (&row)[2], float (&column)[2]) const {
    const float product = in[0] * in[1];
    row[0] += product;
    row[1] += in[1] == of_row ? 1.f : 0.f;
    column[0] += product;
    column[1] += in[1] == of_column ? 1.f : 0.f;
  }
  __device__ __forceinline__ void finish(int64_t image, int64_t r, const float (&of)[2]) const {
    row_sums[image * factors_stride + r] = of[0];
    row_counts[image * factors_stride + r] = of[1];
  }
};

// The columns' two numbers of an image, of those of its blocks, by the whole block of threads.
template <class Op>
__device__ __forceinline__ void join_columns(const Maps& maps, const float* columns, int64_t image,
                                             float divisor, float* sums, float* seconds) {
  const Table table(maps);
  columns += image * table.workspace();
  for (int64_t c = threadIdx.x; c < table.columns; c += kThreads) {
    float sum = 0.f, second = Op::kStart;
    for (int64_t block = 0; block < table.blocks(); ++block) {
      sum += columns[block * 2 * table.columns + c];
      second = Op::join(second, columns[(block * 2 + 1) * table.columns + c]);
    }
    sums[c] = sum / divisor;
    seconds[c] = second;
  }
}

// What a pixel's neighbours sum to: use(place, tap) for those on the map, tap counted from the
// kernel's first.
template <class Use>
__device__ __forceinline__ void for_taps(const DualGateShape& shape, int64_t pixel,
                                         const Use& use) {
  const int height = static_cast<int>(shape.height()), width = static_cast<int>(shape.width);
  const int h = static_cast<int>(pixel) / width - kGateMargin;
  const int w = static_cast<int>(pixel) % width - kGateMargin;
  for (int dy = 0; dy < kGateKernel; ++dy) {
    if (h + dy < 0 || h + dy >= height) continue;
#pragma unroll
    for (int dx = 0; dx < kGateKernel; ++dx) {
      if (w + dx < 0 || w + dx >= width) continue;
      use((h + dy) * width + w + dx, dy * kGateKernel + dx);
    }
  }
}

// A block an image.
__global__ void __launch_bounds__(kThreads)
    make_gates(const DualGateShape shape, const float* reduce_weight, const float* expand_weight,
               const float* spatial_weight, const float* columns, float* states) {
  const Maps& maps = shape.maps;
  const int64_t image = blockIdx.x, channels = maps.channels, hidden = shape.hidden;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = !maps.channels_last;
  const State<float> s(states, shape, image);
  join_columns<Peaks<float>>(
      maps, columns, image, static_cast<float>(column ? channels : maps.pixels),
      column ? s.means[1] : s.means[0], column ? s.largest[1] : s.largest[0]);
  __syncthreads();
  for (int64_t j = warp; j < hidden; j += kWarps) {
    float mean = 0.f, largest = 0.f;
    for (int64_t c = lane; c < channels; c += 32) {
      const float weight = reduce_weight[j * channels + c];
      mean += weight * s.means[0][c];
      largest += weight * s.largest[0][c];
    }
    mean = warp_sum(mean);
    largest = warp_sum(largest);
    if (lane == 0) {
      s.hidden[j] = mean;
      s.hidden[hidden + j] = largest;
    }
  }
  for (int64_t p = threadIdx.x; p < maps.pixels; p += kThreads) {
    float sum = 0.f;
    for_taps(shape, p, [&](int64_t place, int tap) {
      sum += spatial_weight[tap] * s.means[1][place];
      sum += spatial_weight[kGateWeights / 2 + tap] * s.largest[1][place];
    });
    s.gates[1][p] = sigmoid(sum);
  }
  __syncthreads();
  for (int64_t c = warp; c < channels; c += kWarps) {
    float sum = 0.f;
    for (int64_t j = lane; j < hidden; j += 32) {
      sum += expand_weight[c * hidden + j] * (relu(s.hidden[j]) + relu(s.hidden[hidden + j]));
    }
    sum = warp_sum(sum);
    if (lane == 0) s.gates[0][c] = sigmoid(sum);
  }
}

__global__ void __launch_bounds__(kThreads)
    turn_back_gates(const DualGateShape shape, const float* reduce_weight,
                    const float* expand_weight, const float* spatial_weight, const float* columns,
                    const float* states, float* factors, float* partials) {
  KP_DYNAMIC_SHARED(float, shared);  // (kThreads)
  const Maps& maps = shape.maps;
  const int64_t image = blockIdx.x, channels = maps.channels, pixels = maps.pixels;
  const int64_t hidden = shape.hidden;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = !maps.channels_last;
  const State<const float> s(states, shape, image);
  const Factors f(factors, shape, image);
  float* const of_sigmoids = partials + image * shape.partial();
  float* const of_hidden = of_sigmoids + channels;
  float* const of_kernel = of_hidden + 2 * hidden;
  join_columns<Shares<float>>(maps, columns, image, 1.f, column ? f.of_mean[1] : f.of_mean[0],
                              column ? f.of_largest[1] : f.of_largest[0]);
  // No barrier: of what was joined, a thread reads its own.
  for (int64_t c = threadIdx.x; c < channels; c += kThreads) {
    of_sigmoids[c] = f.of_mean[0][c] * s.gates[0][c] * (1.f - s.gates[0][c]);
  }
  for (int64_t p = threadIdx.x; p < pixels; p += kThreads) {
    f.of_sigmoids[p] = f.of_mean[1][p] * s.gates[1][p] * (1.f - s.gates[1][p]);
  }
  __syncthreads();
  for (int64_t first = 0; first < hidden; first += 32) {
    const int64_t j = first + lane;
    float sum = 0.f;
    for (int64_t c = warp; c < channels && j < hidden; c += kWarps) {
      sum += expand_weight[c * hidden + j] * of_sigmoids[c];
    }
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && j < hidden) {
      for (int w = 1; w < kWarps; ++w) sum += shared[w * 32 + lane];
      of_hidden[j] = s.hidden[j] > 0.f ? sum : 0.f;
      of_hidden[hidden + j] = s.hidden[hidden + j] > 0.f ? sum : 0.f;
    }
    __syncthreads();
  }
  for (int64_t c = threadIdx.x; c < channels; c += kThreads) {
    float mean = 0.f, largest = 0.f;
    for (int64_t j = 0; j < hidden; ++j) {
      const float weight = reduce_weight[j * channels + c];
      mean += weight * of_hidden[j];
      largest += weight * of_hidden[hidden + j];
    }
    f.of_mean[0][c] = mean / pixels;
    f.of_largest[0][c] = largest / f.of_largest[0][c];
  }
  for (int64_t p = threadIdx.x; p < pixels; p += kThreads) {
    constexpr int kLast = kGateWeights / 2 - 1;  // the kernel is turned by 180 degrees
    float mean = 0.f, largest = 0.f;
    for_taps(shape, p, [&](int64_t place, int tap) {
      mean += spatial_weight[kLast - tap] * f.of_sigmoids[place];
      largest += spatial_weight[kGateWeights / 2 + kLast - tap] * f.of_sigmoids[place];
    });
    f.of_mean[1][p] = mean / channels;
    f.of_largest[1][p] = largest / f.of_largest[1][p];
  }
  const int width = static_cast<int>(shape.width), height = static_cast<int>(shape.height());
  for (int t = warp; t < kGateWeights; t += kWarps) {
    const float* const map = t < kGateWeights / 2 ? s.means[1] : s.largest[1];
    const int tap = t % (kGateWeights / 2);
    const int dy = tap / kGateKernel - kGateMargin, dx = tap % kGateKernel - kGateMargin;
    float sum = 0.f;
    for (int p = lane; p < pixels; p += 32) {
      const int h = p / width + dy, w = p % width + dx;
      if (h < 0 || h >= height || w < 0 || w >= width) continue;
      sum += f.of_sigmoids[p] * map[h * width + w];
    }
    sum = warp_sum(sum);
    if (lane == 0) of_kernel[t] = sum;
  }
}

template <class T>
struct Output {
  using Element = T;
  using Known = float;  // the gate
  static constexpr int kInputs = 1;
  Maps maps;
  const T* inputs[1];  // y
  T* output;
  const float* row_gates;
  const float* column_gates;
  int64_t stride;  // of the state

  Output(const DualGateShape& shape, const T* y, T* out, const float* states)
      : maps(shape.maps), inputs{y}, output(out) {
    const State<const float> state(states, shape);
    row_gates = state.gates[maps.channels_last];
    column_gates = state.gates[!maps.channels_last];
    stride = state.stride;
  }
  __device__ __forceinline__ Known row(int64_t image, int64_t r) const {
    return row_gates[image * stride + r];
  }
  __device__ __forceinline__ Known column(int64_t image, int64_t c) const {
    return column_gates[image * stride + c];
  }
  __device__ __forceinline__ float result(const float (&y)[1], Known of_row,
                                          Known of_column) const {
    return y[0] * (of_row + of_column);
  }
};

// Through the product, through the means, and through what is the row's or column's largest.
template <class T>
struct Gradient {
  using Element = T;
  struct Known {
    float gate, of_mean, largest, of_largest;
  };
  struct Side {
    const float *gates, *largest, *of_mean, *of_largest;
  };
  static constexpr int kInputs = 2;
  Maps maps;
  const T* inputs[2];  // grad_out, y
  T* output;
  Side rows, columns;
  int64_t stride, factors_stride;

  Gradient(const DualGateShape& shape, const T* grad_out, const T* y, T* grad_y,
           const float* states, float* factors)
      : maps(shape.maps), inputs{grad_out, y}, output(grad_y) {
    const State<const float> state(states, shape);
    const Factors f(factors, shape);
    const auto side = [&](bool i) -> Side {
      return {state.gates[i], state.largest[i], f.of_mean[i], f.of_largest[i]};
    };
    rows = side(maps.channels_last);
    columns = side(!maps.channels_last);
    stride = state.stride;
    factors_stride = f.stride;
  }
  __device__ __forceinline__ Known known(const Side& side, int64_t image, int64_t i) const {
    const int64_t at = image * stride + i, factor_at = image * factors_stride + i;
    return {side.gates[at], side.of_mean[factor_at], side.largest[at], side.of_largest[factor_at]};
  }
  __device__ __forceinline__ Known row(int64_t image, int64_t r) const {
    return known(rows, image, r);
  }
  __device__ __forceinline__ Known column(int64_t image, int64_t c) const {
    return known(columns, image, c);
  }
  __device__ __forceinline__ float result(const float (&in)[2], const Known& of_row,
                                          const Known& of_column) const {
    float sum = in[0] * (of_row.gate + of_column.gate) + (of_row.of_mean + of_column.of_mean);
    if (in[1] == of_row.largest) sum += of_row.of_largest;
    if (in[1] == of_column.largest) sum += of_column.of_largest;
    return sum;
  }
};

template <int N, class Reduce, class Middle, class Write>
cudaError_t run_passes(const Reduce& reduce, const Middle& middle, const Write& write,
                       cudaStream_t stream) {
  constexpr int64_t kFloats = kWarps * 2 * 32 * N;
  cudaError_t error =
      table::launch_rows<N>(table::reduce_table<Reduce, N>, reduce, kFloats, stream);
  if (error == cudaSuccess) error = middle();
  if (error != cudaSuccess) return error;
  return table::launch_rows<N>(table::write_table<Write, N>, write, 0, stream);
}

}  // namespace

size_t dual_gate_workspace(const DualGateShape& shape) {
  const int64_t floats = Table(shape.maps).workspace() + Factors::size(shape);
  return shape.maps.batch * floats * sizeof(float);
}

cudaError_t dual_gate_forward(const void* y, const float* reduce_weight, const float* expand_weight,
                              const float* spatial_weight, void* out, float* state,
                              float* workspace, const DualGateShape& shape, DType dtype,
                              cudaStream_t stream) {
  return channel_passes::with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const T* const in = static_cast<const T*>(y);
    const Peaks<T> reduce(shape, in, workspace, state);
    const Output<T> write(shape, in, static_cast<T*>(out), state);
    const auto middle = [&] {
      return launch(make_gates, dim3(static_cast<unsigned>(shape.maps.batch)), dim3(kThreads), 0,
                    stream, shape, reduce_weight, expand_weight, spatial_weight, workspace, state);
    };
    return table::wide<T>(shape.maps, {y, out})
               ? run_passes<kWidestVector<T>>(reduce, middle, write, stream)
               : run_passes<1>(reduce, middle, write, stream);
  });
}

cudaError_t dual_gate_backward(const void* grad_out, const void* y, const float* reduce_weight,
                               const float* expand_weight, const float* spatial_weight,
                               const float* state, void* grad_y, float* partials, float* workspace,
                               const DualGateShape& shape, DType dtype, cudaStream_t stream) {
  float* const factors = workspace + shape.maps.batch * Table(shape.maps).workspace();
  return channel_passes::with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const T *const grad = static_cast<const T*>(grad_out), *const in = static_cast<const T*>(y);
    const Shares<T> reduce(shape, grad, in, workspace, state, factors);
    const Gradient<T> write(shape, grad, in, static_cast<T*>(grad_y), state, factors);
    const auto middle = [&] {
      return launch(turn_back_gates, dim3(static_cast<unsigned>(shape.maps.batch)), dim3(kThreads),
                    kThreads * sizeof(float), stream, shape, reduce_weight, expand_weight,
                    spatial_weight, workspace, state, factors, partials);
    };
    return table::wide<T>(shape.maps, {grad_out, y, grad_y})
               ? run_passes<kWidestVector<T>>(reduce, middle, write, stream)
               : run_passes<1>(reduce, middle, write, stream);
  });
}

}  // namespace kernelpose::cuda
