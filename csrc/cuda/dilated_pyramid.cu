// The dilated pyramid, a kernel a layer, each of which writes straight into its slice of the
// result.
//
// Floor: x read and every map written once and read once, at 64 images of HRPVT's stem in half 19
// MB and 6 times 25 MB written, 5 times 25 MB read: 290 MB, 97 us of an H100's memory; what lies in
// the 50 MB of L2 is read for less. A tile reads its neighbours' pixels as well, for dilation 5 2.6
// times its own, from L2.
// budget: dilated_pyramid_pack_kernel<*> registers<=40
// budget: dilated_pyramid_mask_kernel<*> registers<=40
// budget: dilated_pyramid_direct_kernel<*> registers<=128
// budget: dilated_pyramid_tile_kernel<16-bit, 1, *> registers<=96
// budget: dilated_pyramid_tile_kernel<float, 1, *> registers<=96
// budget: dilated_pyramid_tile_kernel<16-bit, 4, *> registers<=168
// budget: dilated_pyramid_tile_kernel<float, 4, 16> registers<=168
// budget: dilated_pyramid_tile_kernel<float, 4, 32> registers<=255
#include "dilated_pyramid.h"
#include "dilated_pyramid_layer.cuh"

namespace kernelpose::cuda {
namespace {

using namespace pyramid;

constexpr int kMultiprocessors = 132;
// Shared memory of a tile of 16 rows, so that two blocks fit a multiprocessor, and of one of 4.
constexpr int64_t kLargeTileBytes = 80 * 1024;
constexpr int64_t kSmallTileBytes = 160 * 1024;
constexpr int kPackedAtOnce = 8;  // layers

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Output channels that a block computes together.
int outputs_together(int64_t outputs) { return outputs > 16 ? 32 : 16; }

int64_t rounded(int64_t outputs) {
  const int together = outputs_together(outputs);
  return divide_up(outputs, together) * together;
}

int64_t packed_size(int64_t channels, int64_t outputs) {
  return divide_up(channels, kStep) * kPyramidTaps * rounded(outputs) * kStep;
}

template <class T>
struct PackLayers {
  struct One {
    const float* weight;
    int64_t begin, end;  // in `to`
    int channels, outputs, rounded;
  };
  One layers[kPackedAtOnce];
  T* to;
  int64_t begin, end;
};

template <class T>
__global__ void __launch_bounds__(kThreads) dilated_pyramid_pack_kernel(const PackLayers<T> pack) {
  const int64_t i = pack.begin + int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= pack.end) return;
#pragma unroll
  for (int which = 0; which < kPackedAtOnce; ++which) {
    const auto& layer = pack.layers[which];
    if (i < layer.begin || i >= layer.end) continue;
    const int64_t row = (i - layer.begin) / kStep;
    const int output = row % layer.rounded, tap = row / layer.rounded % kPyramidTaps;
    const int64_t channel = row / layer.rounded / kPyramidTaps * kStep + (i - layer.begin) % kStep;
    const bool exists = output < layer.outputs && channel < layer.channels;
    const int64_t at = (int64_t{output} * layer.channels + channel) * kPyramidTaps + tap;
    pack.to[i] = from_float<T>(exists ? layer.weight[at] : 0.f);
  }
}

template <class T>
cudaError_t pack(const DilatedPyramidLayers& layers, const DilatedPyramidShape& shape, T* to,
                 cudaStream_t stream) {
  int64_t channels = shape.channels, place = 0;
  for (size_t first = 0; first < layers.size(); first += kPackedAtOnce) {
    PackLayers<T> pack = {};
    pack.to = to;
    pack.begin = place;
    for (size_t i = first; i < std::min(layers.size(), first + kPackedAtOnce); ++i) {
      const int64_t outputs = layers[i].channels, size = packed_size(channels, outputs);
      pack.layers[i - first] = {static_cast<const float*>(layers[i].weight),
                                place,
                                place + size,
                                static_cast<int>(channels),
                                static_cast<int>(outputs),
                                static_cast<int>(rounded(outputs))};
      place += size;
      channels = outputs;
    }
    pack.end = place;
    const cudaError_t error =
        launch(dilated_pyramid_pack_kernel<T>,
               dim3(static_cast<unsigned>(divide_up(pack.end - pack.begin, kThreads))),
               dim3(kThreads), 0, stream, pack);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class T, int M, int N>
cudaError_t launch_tiles(const PyramidLayer<T>& layer, int64_t bytes, cudaStream_t stream) {
  const int64_t tiles =
      layer.batch * divide_up(layer.out_height, kWarps * M) * divide_up(layer.out_width, kColumns);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(divide_up(layer.outputs, N)));
  return launch(dilated_pyramid_tile_kernel<T, M, N>, grid, dim3(kThreads),
                static_cast<size_t>(bytes), stream, layer);
}

template <class T, int N>
cudaError_t run_tiles(const PyramidLayer<T>& layer, bool* ran, cudaStream_t stream) {
  const auto bytes = [&](int rows) {
    const int64_t pixels = tile_pixels(layer, rows) + kPyramidTaps * N;
    return pixels * kPixelStride<T> * static_cast<int64_t>(sizeof(T));
  };
  const int64_t large = bytes(4 * kWarps), small = bytes(kWarps);
  const int64_t blocks = layer.batch * divide_up(layer.out_height, 4 * kWarps) *
                         divide_up(layer.out_width, kColumns) * divide_up(layer.outputs, N);
  *ran = true;
  if (large <= kLargeTileBytes && blocks >= 2 * kMultiprocessors) {
    return launch_tiles<T, 4, N>(layer, large, stream);
  }
  if (small <= kSmallTileBytes) return launch_tiles<T, 1, N>(layer, small, stream);
  *ran = false;
  return cudaSuccess;
}

template <class T>
cudaError_t run_layer(const PyramidLayer<T>& layer, cudaStream_t stream) {
  if (layer.channels > kFewChannels) {
    bool ran = false;
    const cudaError_t error = outputs_together(layer.outputs) == 32
                                  ? run_tiles<T, 32>(layer, &ran, stream)
                                  : run_tiles<T, 16>(layer, &ran, stream);
    if (ran) return error;
  }
  const int64_t pixels = int64_t{layer.out_height} * layer.out_width;
  const dim3 grid(static_cast<unsigned>(layer.batch * divide_up(pixels, kThreads)),
                  static_cast<unsigned>(divide_up(layer.outputs, kDirectOutputs)));
  const size_t bytes = kFewChannels * kPyramidTaps * kDirectOutputs * sizeof(float);
  return launch(dilated_pyramid_direct_kernel<T>, grid, dim3(kThreads), bytes, stream, layer);
}

// Channels from `first` on of maps of `channels`.
template <class T>
MapView<T> view(T* maps, const DilatedPyramidShape& shape, int64_t channels, int64_t pixels,
                int64_t first) {
  const int64_t channel = shape.channels_last ? 1 : pixels;
  return {maps == nullptr ? nullptr : maps + first * channel, channels * pixels,
          shape.channels_last ? channels : 1, channel};
}

// Whether accesses of 16 bytes to `own` channels, or to tiles of a width, stay within them.
template <class T>
bool is_aligned(const MapView<T>& view, bool channels_last, int64_t own, int64_t width) {
  constexpr int n = kWidestVector<T>;
  const bool dense = channels_last ? own % n == 0 && view.pixel % n == 0 : width % n == 0;
  return dense && view.image % n == 0 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
}

template <class T>
cudaError_t forward(const T* x, const DilatedPyramidLayers& layers, T* out, T* maps, bool keep,
                    T* packed, const DilatedPyramidShape& shape, cudaStream_t stream) {
  cudaError_t error = pack(layers, shape, packed, stream);
  const int64_t all = pyramid_channels(layers), pixels = shape.out_pixels();
  const int64_t width = shape.out_width();
  T* const every = shape.sum ? maps : out;
  PyramidLayer<T> layer = {};
  layer.in = view(x, shape, shape.channels, shape.height * shape.width, 0);
  layer.channels = static_cast<int>(shape.channels);
  layer.height = static_cast<int>(shape.height);
  layer.width = static_cast<int>(shape.width);
  layer.stride = static_cast<int>(shape.stride);
  layer.batch = shape.batch;
  layer.relu = shape.relu;
  layer.out_height = static_cast<int>(shape.out_height());
  layer.out_width = static_cast<int>(width);
  layer.packed = packed;
  int64_t first = 0;
  for (size_t i = 0; i < layers.size() && error == cudaSuccess; ++i) {
    const int64_t outputs = layers[i].channels;
    const bool last = i + 1 == layers.size();
    layer.weight = static_cast<const float*>(layers[i].weight);
    layer.bias = static_cast<const float*>(layers[i].bias);
    layer.outputs = static_cast<int>(outputs);
    layer.dilation = static_cast<int>(layers[i].dilation);
    layer.map = view(every, shape, all, pixels, first);
    if (shape.sum && last) {
      layer.total = view(out, shape, outputs, pixels, 0);
      layer.first = view(static_cast<const T*>(maps), shape, all, pixels, 0);
      layer.terms = static_cast<int64_t>(i);
      if (!keep) layer.map.data = nullptr;
    }
    // Tiles lie at multiples of 16 pixels.
    layer.aligned_in = shape.channels_last && is_aligned(layer.in, true, layer.channels, 0);
    layer.aligned_map = is_aligned(layer.map, shape.channels_last, outputs, width);
    layer.aligned_total = is_aligned(layer.total, shape.channels_last, outputs, width);
    error = run_layer(layer, stream);
    layer.in = view(static_cast<const T*>(every), shape, all, pixels, first);
    layer.packed += packed_size(layer.channels, outputs);
    layer.channels = layer.outputs;
    layer.height = layer.out_height;
    layer.width = layer.out_width;
    layer.stride = 1;
    first += outputs;
  }
  return error;
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    dilated_pyramid_mask_kernel(const T* grad_out, const T* carry, const T* map, T* grad,
                                PyramidRows rows) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, across = rows.columns / V;
  if (i >= rows.rows * across) return;
  const int64_t row = rows.rows * across < (int64_t{1} << 31)
                          ? static_cast<uint32_t>(i) / static_cast<uint32_t>(across)
                          : i / across;
  const int64_t column = (i - row * across) * V;
  const auto from = load_vector<V>(grad_out + row * rows.grad_out_row + column);
  ElementVector<T, V> added = {}, gate = {}, to;
  if (carry != nullptr) added = load_vector<V>(carry + i * V);
  if (map != nullptr) gate = load_vector<V>(map + row * rows.map_row + column);
#pragma unroll
  for (int e = 0; e < V; ++e) {
    float sum = to_float(from.values[e]);
    if (carry != nullptr) sum += to_float(added.values[e]);
    if (map != nullptr && to_float(gate.values[e]) <= 0.f) sum = 0.f;
    to.values[e] = from_float<T>(sum);
  }
  store_vector(grad + i * V, to);
}

template <class T>
cudaError_t mask(const T* grad_out, const T* carry, const T* map, T* grad, const PyramidRows& rows,
                 cudaStream_t stream) {
  constexpr int n = kWidestVector<T>;
  const auto aligned = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool vectors = rows.columns % n == 0 && rows.grad_out_row % n == 0 &&
                       rows.map_row % n == 0 && aligned(grad_out) && aligned(carry) &&
                       aligned(map) && aligned(grad);
  const int64_t accesses = rows.rows * rows.columns / (vectors ? n : 1);
  const dim3 grid(static_cast<unsigned>(divide_up(accesses, kThreads)));
  return launch(vectors ? dilated_pyramid_mask_kernel<T, n> : dilated_pyramid_mask_kernel<T, 1>,
                grid, dim3(kThreads), 0, stream, grad_out, carry, map, grad, rows);
}

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

}  // namespace

int64_t dilated_pyramid_workspace(const DilatedPyramidLayers& layers,
                                  const DilatedPyramidShape& shape) {
  int64_t channels = shape.channels, size = 0;
  for (const DilatedPyramidLayer& layer : layers) {
    size += packed_size(channels, layer.channels);
    channels = layer.channels;
  }
  return size;
}

cudaError_t dilated_pyramid_forward(const void* x, const DilatedPyramidLayers& layers, void* out,
                                    void* maps, bool keep, void* packed,
                                    const DilatedPyramidShape& shape, DType dtype,
                                    cudaStream_t stream) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    return forward(static_cast<const T*>(x), layers, static_cast<T*>(out), static_cast<T*>(maps),
                   keep, static_cast<T*>(packed), shape, stream);
  });
}

cudaError_t dilated_pyramid_mask(const void* grad_out, const void* carry, const void* map,
                                 void* grad, const PyramidRows& rows, DType dtype,
                                 cudaStream_t stream) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    return mask(static_cast<const T*>(grad_out), static_cast<const T*>(carry),
                static_cast<const T*>(map), static_cast<T*>(grad), rows, stream);
  });
}

}  // namespace kernelpose::cuda
