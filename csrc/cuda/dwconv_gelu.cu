// Depthwise 3x3 convolution and GELU of tokens. A block takes a tile of a map: some columns, a
// strip of rows, some channels. A thread takes N channels of a column and walks down it; each row
// of three neighbours that it reads goes into the sums of the three rows of z that it belongs to:
//
//   row y of x   [x-1] [x] [x+1]      z(y-1) += taps 6-8, then done   z(y) += 3-5   z(y+1) += 0-2
//
// Neighbours are read again by the threads of the columns beside, from the L1 cache.
//
// Backward a thread first does so for g = grad_out GELU'(z), also on the pixels around the tile,
// into shared memory. Then it walks down the tile once more: rows of three g make the gradient of
// x, and g times nine x the gradients of the weights, which are summed over the columns and written
// as the tile's part. No atomics: the same bits on every run.
//
// Floor: x read and out written once, at 64 maps of 512 x 64 x 48 in half 403 MB, 134 us of an
// H100's memory, and by estimate nearly as much arithmetic, most of it GELU; backward x and
// grad_out read and grad_x written, 604 MB, 201 us, and 16 MB of parts. Shared memory: backward,
// 128 bytes for each g and 10 sums for each warp and channel.
// budget: dwconv_gelu_forward_kernel<*> registers<=168
// budget: dwconv_gelu_backward_kernel<*> registers<=120
#include "dwconv_gelu.h"
#include "kernelpose/channel_passes.cuh"
#include "kernelpose/gelu.cuh"

namespace kernelpose::cuda {
namespace {

constexpr int kForwardThreads = 128;
template <int N>
constexpr int kForwardLanes = N == 1 ? 32 : 8;  // threads a pixel: 128 bytes of it
constexpr int kBackwardChannels = 32, kBackwardColumns = 16;
template <int N>
constexpr int kBackwardThreads = N == 1 ? 576 : 160;  // whole warps, for two columns more
constexpr int kLongStrip = 16, kShortStrip = 4;
constexpr int64_t kEnoughBlocks = 4 * 132;  // for an H100

// How a kernel cuts maps into blocks of (lanes, rows of threads).
struct Tiling {
  DwconvGeluShape shape;
  int channels;  // of a block
  int columns;   // of a block
  int strip;     // rows of a block

  KP_HOST_DEVICE int64_t groups() const { return (shape.channels + channels - 1) / channels; }
  KP_HOST_DEVICE int64_t tiles() const { return (shape.width + columns - 1) / columns; }
  KP_HOST_DEVICE int64_t strips() const { return (shape.height + strip - 1) / strip; }
  KP_HOST_DEVICE int64_t parts() const { return shape.batch * strips() * tiles(); }
  int64_t blocks() const { return parts() * groups(); }

  // Columns evenly in as few tiles as it takes; shorter strips where blocks are few.
  Tiling(const DwconvGeluShape& shape, int channels, int most_columns)
      : shape(shape), channels(channels), columns(most_columns), strip(kLongStrip) {
    columns = static_cast<int>((shape.width + tiles() - 1) / tiles());
    while (strip > kShortStrip && blocks() < kEnoughBlocks) strip /= 2;
  }
};

// The tile of a block, and the thread's place in it.
struct Place {
  int64_t part;  // of the maps, whatever the channels
  int64_t image, channel;
  int64_t first, end;  // rows
  int64_t column;      // of the tile's first

  __device__ __forceinline__ Place(const Tiling& tiling, int vector) {
    channel = blockIdx.x % tiling.groups() * tiling.channels + threadIdx.x * vector;
    part = blockIdx.x / tiling.groups();
    column = part % tiling.tiles() * tiling.columns;
    const int64_t rest = part / tiling.tiles();
    first = rest % tiling.strips() * tiling.strip;
    end = min(tiling.shape.height, first + tiling.strip);
    image = rest / tiling.strips();
  }
};

// Three neighbours in a row.
template <class T, int N>
using Triple = ElementVector<T, N>[3];

// A column of a map of N channels.
template <class T, int N>
struct Column {
  const T* data;  // at row 0
  int64_t height, width, channels, column;

  __device__ __forceinline__ Column(const T* maps, const DwconvGeluShape& shape, int64_t image,
                                    int64_t x, int64_t channel)
      : data(maps + image * shape.image() + x * shape.channels + channel),
        height(shape.height),
        width(shape.width),
        channels(shape.channels),
        column(x) {}

  // Row y and, at either side, its neighbours; zeros off the map.
  __device__ __forceinline__ void read(int64_t y, Triple<T, N>& row) const {
    const T* const from = data + y * width * channels;
    const bool inside = y >= 0 && y < height;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      if (inside && column + j >= 1 && column + j <= width) {
        row[j] = load_vector<N>(from + (j - 1) * channels);
      } else {
#pragma unroll
        for (int e = 0; e < N; ++e) row[j].values[e] = from_float<T>(0.f);
      }
    }
  }
};

// The taps and the bias of N channels.
template <int N>
struct Kernel {
  ElementVector<float, N> taps[kDwconvTaps], bias;  // taps: as they lie, channel by channel

  __device__ __forceinline__ Kernel(const float* weight, const float* biases, int64_t channel) {
#pragma unroll
    for (int i = 0; i < kDwconvTaps; ++i) {
      if constexpr (N == 8) {
        const auto low = load_vector<4>(weight + channel * kDwconvTaps + i * 8);
        const auto high = load_vector<4>(weight + channel * kDwconvTaps + i * 8 + 4);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          taps[i].values[e] = low.values[e], taps[i].values[4 + e] = high.values[e];
      } else {
        taps[i] = load_vector<N>(weight + channel * kDwconvTaps + i * N);
      }
    }
#pragma unroll
    for (int e = 0; e < N; ++e) bias.values[e] = biases[channel + e];
  }
  __device__ __forceinline__ float tap(int t, int e) const {
    const int at = e * kDwconvTaps + t;
    return taps[at / N].values[at % N];
  }
};

// Sums of the rows y - 1, y and y + 1 while row y is at hand.
template <int N>
struct RowSums {
  float sums[3][N];

  __device__ __forceinline__ explicit RowSums(const ElementVector<float, N>& start) {
#pragma unroll
    for (int i = 0; i < 3; ++i) begin(i, start);
  }
  __device__ __forceinline__ void begin(int i, const ElementVector<float, N>& start) {
#pragma unroll
    for (int e = 0; e < N; ++e) sums[i][e] = start.values[e];
  }
  // Row y + 1 comes next.
  __device__ __forceinline__ void step(const ElementVector<float, N>& start) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      sums[0][e] = sums[1][e];
      sums[1][e] = sums[2][e];
    }
    begin(2, start);
  }
  template <class T>
  __device__ __forceinline__ void add(const Triple<T, N>& row, const Kernel<N>& kernel) {
#pragma unroll
    for (int j = 0; j < 3; ++j) {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float value = to_float(row[j].values[e]);
#pragma unroll
        for (int i = 0; i < 3; ++i) sums[i][e] += value * kernel.tap(3 * (2 - i) + j, e);
      }
    }
  }
  // The same with the kernel turned by 180 degrees.
  __device__ __forceinline__ void add_turned(const Triple<float, N>& row, const Kernel<N>& kernel) {
#pragma unroll
    for (int j = 0; j < 3; ++j) {
#pragma unroll
      for (int e = 0; e < N; ++e) {
#pragma unroll
        for (int i = 0; i < 3; ++i) sums[i][e] += row[j].values[e] * kernel.tap(3 * i + 2 - j, e);
      }
    }
  }
};

template <class T>
struct Forward {
  const T* x;
  const float* weight;
  const float* bias;
  T* out;
  Tiling tiling;
};

template <class T, int N>
__global__ void __launch_bounds__(kForwardThreads, 3)
    dwconv_gelu_forward_kernel(const Forward<T> op) {
  const DwconvGeluShape& shape = op.tiling.shape;
  const Place place(op.tiling, N);
  const int64_t x = place.column + threadIdx.y;
  if (place.channel >= shape.channels || x >= shape.width) return;
  const Column<T, N> column(op.x, shape, place.image, x, place.channel);
  T* const out = op.out + (column.data - op.x);
  const Kernel<N> kernel(op.weight, op.bias, place.channel);
  RowSums<N> z(kernel.bias);
  Triple<T, N> row, next;
  column.read(place.first - 1, next);
#pragma unroll 1
  for (int64_t y = place.first - 1; y <= place.end; ++y) {
#pragma unroll
    for (int j = 0; j < 3; ++j) row[j] = next[j];
    if (y < place.end) column.read(y + 1, next);
    z.add(row, kernel);
    if (y > place.first) {
      ElementVector<T, N> result;
#pragma unroll
      for (int e = 0; e < N; ++e) result.values[e] = from_float<T>(gelu(z.sums[0][e]));
      store_vector(out + (y - 1) * shape.width * shape.channels, result);
    }
    z.step(kernel.bias);
  }
}

template <class T>
struct Backward {
  const T* grad_out;
  const T* x;
  const float* weight;
  const float* bias;
  float* partial;
  T* grad_x;
  Tiling tiling;
};

// blockDim.y is tiling.columns + 2, rounded up to whole warps.
template <class T, int N>
__global__ void __launch_bounds__(kBackwardThreads<N>, N == 1 ? 1 : 3)
    dwconv_gelu_backward_kernel(const Backward<T> op) {
  constexpr int kLanes = kBackwardChannels / N;
  const DwconvGeluShape& shape = op.tiling.shape;
  const Place place(op.tiling, N);
  const int around = op.tiling.columns + 2;
  // g (strip + 2, columns + 2, channels), from the pixel up and left of the tile; then (warps, 10,
  // channels).
  KP_DYNAMIC_SHARED(float, shared);
  float* const own_g = shared + threadIdx.y * kBackwardChannels + threadIdx.x * N;
  float* const sums = shared + (op.tiling.strip + 2) * around * kBackwardChannels;
  const int row_size = around * kBackwardChannels;
  const int64_t x = place.column + threadIdx.y - 1;
  const bool has_channels = place.channel < shape.channels;
  const int64_t channel = has_channels ? place.channel : 0;
  const Column<T, N> column(op.x, shape, place.image, x, channel);
  const T* const grad = op.grad_out + (column.data - op.x);
  const Kernel<N> kernel(op.weight, op.bias, channel);
  const int64_t row_elements = shape.width * shape.channels;

  if (threadIdx.y < around) {
    const bool on_map = has_channels && x >= 0 && x < shape.width;
    RowSums<N> z(kernel.bias);
    Triple<T, N> row, next;
    column.read(place.first - 2, next);
#pragma unroll 1
    for (int64_t y = place.first - 2; y <= place.end + 1; ++y) {
#pragma unroll
      for (int j = 0; j < 3; ++j) row[j] = next[j];
      if (y <= place.end) column.read(y + 1, next);
      const bool real = on_map && y >= 1 && y <= shape.height;
      ElementVector<T, N> incoming;
      if (real && y >= place.first) incoming = load_vector<N>(grad + (y - 1) * row_elements);
      z.add(row, kernel);
      if (y >= place.first) {
        ElementVector<float, N> g;
#pragma unroll
        for (int e = 0; e < N; ++e) {
          g.values[e] = real ? to_float(incoming.values[e]) * gelu_derivative(z.sums[0][e]) : 0.f;
        }
        store_vector(own_g + (y - place.first) * row_size, g);
      }
      z.step(kernel.bias);
    }
  }
  __syncthreads();

  float of_taps[kDwconvTaps][N] = {}, of_bias[N] = {};
  if (threadIdx.y >= 1 && threadIdx.y <= op.tiling.columns && has_channels && x < shape.width) {
    T* const to = op.grad_x + (column.data - op.x);
    const ElementVector<float, N> nothing = {};
    RowSums<N> gradient(nothing);
#pragma unroll 1
    for (int64_t y = place.first - 1; y <= place.end; ++y) {
      Triple<float, N> g;
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        g[j] =
            load_vector<N>(own_g + (y - place.first + 1) * row_size + (j - 1) * kBackwardChannels);
      }
      gradient.add_turned(g, kernel);
      if (y > place.first) {
        ElementVector<T, N> result;
#pragma unroll
        for (int e = 0; e < N; ++e) result.values[e] = from_float<T>(gradient.sums[0][e]);
        store_vector(to + (y - 1) * row_elements, result);
      }
      gradient.step(nothing);
    }
    Triple<T, N> rows[3];  // of x: y - 1, y, y + 1
    column.read(place.first - 1, rows[1]);
    column.read(place.first, rows[2]);
#pragma unroll 1
    for (int64_t y = place.first; y < place.end; ++y) {
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        rows[0][j] = rows[1][j];
        rows[1][j] = rows[2][j];
      }
      column.read(y + 1, rows[2]);
      const auto g = load_vector<N>(own_g + (y - place.first + 1) * row_size);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        of_bias[e] += g.values[e];
#pragma unroll
        for (int t = 0; t < kDwconvTaps; ++t) {
          of_taps[t][e] += g.values[e] * to_float(rows[t / 3][t % 3].values[e]);
        }
      }
    }
  }
  const int thread = threadIdx.y * kLanes + threadIdx.x;
  const int threads = blockDim.y * kLanes;
#pragma unroll
  for (int k = 0; k < kDwconvSums; ++k) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float mine = k < kDwconvTaps ? of_taps[k < kDwconvTaps ? k : 0][e] : of_bias[e];
      const float sum = channel_passes::warp_sum(mine, kLanes);
      if (thread % 32 < kLanes) {
        sums[(thread / 32 * kDwconvSums + k) * kBackwardChannels + threadIdx.x * N + e] = sum;
      }
    }
  }
  __syncthreads();
  const int64_t first = blockIdx.x % op.tiling.groups() * kBackwardChannels;
  for (int i = thread; i < kDwconvSums * kBackwardChannels; i += threads) {
    const int64_t c = first + i % kBackwardChannels;
    if (c >= shape.channels) continue;
    float sum = 0.f;
    for (int w = 0; w < threads / 32; ++w) sum += sums[w * kDwconvSums * kBackwardChannels + i];
    op.partial[(place.part * kDwconvSums + i / kBackwardChannels) * shape.channels + c] = sum;
  }
}

// The same for all element types and alignments, as parts are counted before.
Tiling backward_tiling(const DwconvGeluShape& shape) {
  return Tiling(shape, kBackwardChannels, kBackwardColumns);
}

// Whether vectors of N elements, and 16 bytes of weights, begin where such are read.
template <class T, int N>
bool aligned(int64_t channels, std::initializer_list<const void*> maps, const float* weight) {
  for (const void* p : maps) {
    if (reinterpret_cast<uintptr_t>(p) % (N * sizeof(T)) != 0) return false;
  }
  return channels % N == 0 && reinterpret_cast<uintptr_t>(weight) % 16 == 0;
}

template <class T, int N>
cudaError_t launch_forward(const Forward<T>& op, cudaStream_t stream) {
  const int64_t blocks = op.tiling.blocks();
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(dwconv_gelu_forward_kernel<T, N>, dim3(static_cast<unsigned>(blocks)),
                dim3(kForwardLanes<N>, op.tiling.columns), 0, stream, op);
}

template <class T, int N>
cudaError_t launch_backward(const Backward<T>& op, cudaStream_t stream) {
  constexpr int kLanes = kBackwardChannels / N, kPerWarp = 32 / kLanes;
  const Tiling& tiling = op.tiling;
  const int64_t blocks = tiling.blocks();
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const int rows = (tiling.columns + 2 + kPerWarp - 1) / kPerWarp * kPerWarp;
  static_assert(
      ((kLongStrip + 2) * (kBackwardColumns + 2) + kBackwardThreads<N> / 32 * kDwconvSums) *
          kBackwardChannels * 4 <=
      (N == 1 ? 64 : 48) * 1024);
  const int floats = ((tiling.strip + 2) * (tiling.columns + 2) + rows / kPerWarp * kDwconvSums) *
                     kBackwardChannels;
  return launch(dwconv_gelu_backward_kernel<T, N>, dim3(static_cast<unsigned>(blocks)),
                dim3(kLanes, rows), floats * sizeof(float), stream, op);
}

}  // namespace

int64_t dwconv_gelu_parts(const DwconvGeluShape& shape) { return backward_tiling(shape).parts(); }

cudaError_t dwconv_gelu_forward(const void* x, const float* weight, const float* bias, void* out,
                                const DwconvGeluShape& shape, DType dtype, cudaStream_t stream) {
  return channel_passes::with_element(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int N = kWidestVector<T>;
    const auto op = [&](int lanes, int vector) {
      return Forward<T>{static_cast<const T*>(x), weight, bias, static_cast<T*>(out),
                        Tiling(shape, lanes * vector, kForwardThreads / lanes)};
    };
    return aligned<T, N>(shape.channels, {x, out}, weight)
               ? launch_forward<T, N>(op(kForwardLanes<N>, N), stream)
               : launch_forward<T, 1>(op(kForwardLanes<1>, 1), stream);
  });
}

cudaError_t dwconv_gelu_backward(const void* grad_out, const void* x, const float* weight,
                                 const float* bias, float* partial, void* grad_x,
                                 const DwconvGeluShape& shape, DType dtype, cudaStream_t stream) {
  return channel_passes::with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const Backward<T> op{
        static_cast<const T*>(grad_out), static_cast<const T*>(x), weight, bias, partial,
        static_cast<T*>(grad_x),         backward_tiling(shape)};
    return aligned<T, 4>(shape.channels, {grad_out, x, grad_x}, weight)
               ? launch_backward<T, 4>(op, stream)
               : launch_backward<T, 1>(op, stream);
  });
}

}  // namespace kernelpose::cuda
