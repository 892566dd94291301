// Two 1x1 convolutions and what lies between, one launch. A block makes a tile of output pixels; of
// the wide map it has kChunk channels at a time, of the tile and a pixel around it:
//
//   places  where the pixels of x lie that the tile is made of, -1 for those outside
//   xs      near x slice    those pixels, input channels: all of them once, where they fit
//   we      kChunk x slice  the chunk's rows of expand
//   wp      16 kTiles x kChunk  its columns of project
//   hs      near x kChunk   act1(expand x), zeros outside the image
//   ys      own x kChunk    act2(depthwise hs); hs itself where there is no depthwise convolution
//
// The sums of the second product stay in registers from chunk to chunk. wp is on its way during the
// first product, the next we during the depthwise convolution. Inputs beyond a slice come anew for
// every chunk; outputs beyond 16 kTiles are other blocks', which make the wide map anew.
//
// Floor: x read and out written once, 50 MB for 64 images of 64 x 48 x 64 in 16 bits, 17
// microseconds of an H100's memory. The first product is 1.75 times what layers would compute, 112
// rows for 8 x 8 pixels, and at stride 2 1.5 times, 96 rows for the 64 under 4 x 4 outputs. The
// weights, hidden * (inputs + outputs), are read by every block from L2. What a chunk moves through
// shared memory, more than the tensor cores, bounds the rest.
// budget: inverted_bottleneck_kernel<16-bit, 2> registers<=80
// budget: inverted_bottleneck_kernel<16-bit, 4> registers<=80
// budget: inverted_bottleneck_kernel<16-bit, 8> registers<=128
// budget: inverted_bottleneck_kernel<16-bit, 12> registers<=128
// budget: inverted_bottleneck_kernel<float, 2> registers<=80
// budget: inverted_bottleneck_kernel<float, 4> registers<=80
// budget: inverted_bottleneck_kernel<float, 8> registers<=128
// budget: inverted_bottleneck_kernel<float, 12> registers<=128
#include <algorithm>

#include "inverted_bottleneck.h"
#include "inverted_bottleneck_tile.cuh"
#include "kernelpose/attention.cuh"
#include "kernelpose/channel_passes.cuh"

namespace kernelpose::cuda {
namespace {

using namespace bottleneck;

// kTiles: of 8 outputs each, of a warp; two warps share 16 pixels.
template <class T, int kTiles>
__global__ void __launch_bounds__(32 * kMostWarps, kTiles <= 4 ? 3 : 2)
    inverted_bottleneck_kernel(const Problem<T> op) {
  constexpr int kOutputs = 16 * kTiles, kColumns = kChunk<T> / 8, kStride = kChunkStride<T>;
  KP_DYNAMIC_SHARED(unsigned char, shared);
  const int slice_stride = op.slice_stride();
  int* const places = reinterpret_cast<int*>(shared);
  T* const xs = reinterpret_cast<T*>(places + kMostNear);
  T* const we = xs + 16 * op.near_products * slice_stride;
  T* const wp = we + kChunk<T> * slice_stride;
  T* const hs = wp + kOutputs * kStride;
  T* const ys = op.stride == 0 ? hs : hs + 16 * op.near_products * kStride;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;

  const int parts = (op.outputs + kOutputs - 1) / kOutputs;
  const int output = static_cast<int>(blockIdx.x % parts) * kOutputs;
  const int tile = static_cast<int>(blockIdx.x / parts % op.tiles);
  const int64_t image = blockIdx.x / parts / op.tiles;
  const int top = tile / op.across * op.rows, left = tile % op.across * op.columns;
  const T* const x = op.x + image * op.height * op.width * op.inputs;
  for (int i = threadIdx.x; i < 16 * op.near_products; i += blockDim.x) {
    const int around = op.stride == 0 ? 0 : 1;
    const int row = top * max(op.stride, 1) - around + i / op.near_columns;
    const int column = left * max(op.stride, 1) - around + i % op.near_columns;
    const bool exists =
        i < op.near && row >= 0 && row < op.height && column >= 0 && column < op.width;
    places[i] = exists ? row * op.width + column : -1;
  }
  __syncthreads();

  // Step by step: a slice of the inputs and of a chunk's weights for them.
  const auto load_slice = [&](int step) {
    const int first = step % op.slices * op.slice, chunk = step / op.slices * kChunk<T>;
    if (chunk >= op.hidden) return;
    const int valid = op.inputs - first;
    if (step == 0 || op.slices > 1) {
      load_rows(xs, slice_stride, 16 * op.near_products, op.slice, valid, op.aligned_x, op.x,
                [&](int i) {
                  return places[i] < 0 ? nullptr : x + int64_t{places[i]} * op.inputs + first;
                });
    }
    load_rows(
        we, slice_stride, kChunk<T>, op.slice, valid, op.aligned_expand, op.expand, [&](int i) {
          const int channel = chunk + i;
          return channel < op.hidden ? op.expand + int64_t{channel} * op.inputs + first : nullptr;
        });
  };

  // A warp's share of the first product: 16 pixels and all columns of a chunk, or half of them.
  const int near_product = warp % op.near_products;
  const int pieces = warps >= 2 * op.near_products ? 2 : 1, piece = warp / op.near_products;
  const int first_column = piece * kColumns / pieces;
  const int end_column = piece < pieces ? first_column + kColumns / pieces : 0;
  const int hidden_row = 16 * near_product + (lane >> 2), pair = 2 * (lane & 3);
  const bool exists[2] = {places[hidden_row] >= 0, places[hidden_row + 8] >= 0};
  // And of the second: 16 pixels and half of the outputs.
  const int own_product = warp % op.own_products, own_output = warp / op.own_products * 8 * kTiles;
  const int wanted = min(8 * kTiles, op.outputs - output - own_output);
  const int end_output = own_output < kOutputs && wanted > 0 ? (wanted + 15) / 16 * 2 : 0;
  float sums[kTiles][4];
  start(sums, op.project_bias, output + own_output, op.outputs, lane);

  load_slice(0);
  cp_async_commit();
  for (int chunk = 0, step = 0; chunk < op.hidden; chunk += kChunk<T>) {
    float c[kColumns][4];
    start(c, op.expand_bias, chunk, op.hidden, lane);
    for (int slice = 0; slice < op.slices; ++slice) {
      cp_async_wait<0>();
      __syncthreads();  // the slice is there, and hs and wp are free
      if (slice == 0) {
        load_rows(wp, kStride, kOutputs, kChunk<T>, op.hidden - chunk, op.aligned_project,
                  op.project, [&](int i) {
                    const int64_t row = output + i;
                    return row < op.outputs ? op.project + row * op.hidden + chunk : nullptr;
                  });
        cp_async_commit();
      }
      add_product(c, first_column, end_column, xs + 16 * near_product * slice_stride, slice_stride,
                  we, slice_stride, op.slice, lane);
      ++step;
      if (slice + 1 < op.slices) {
        __syncthreads();  // all are done with the slice
        load_slice(step);
        cp_async_commit();
      }
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (j < first_column || j >= end_column) continue;
      const int column = 8 * j + pair;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float h[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const bool is = exists[half] && chunk + column + e < op.hidden;
          h[e] = is ? activate(op.act1, c[j][2 * half + e]) : 0.f;
        }
        store_pair(hs + (hidden_row + 8 * half) * kStride + column, h[0], h[1]);
      }
    }
    __syncthreads();  // hs is complete, the slice free
    load_slice(step);
    cp_async_commit();
    if (op.stride == 1) convolve<1>(op, chunk, hs, ys);
    if (op.stride == 2) convolve<2>(op, chunk, hs, ys);
    cp_async_wait<1>();
    __syncthreads();  // ys and wp are complete
    add_product(sums, 0, end_output, ys + 16 * own_product * kStride, kStride,
                wp + own_output * kStride, kStride, kChunk<T>, lane);
  }

  __syncthreads();  // all are done with what staging lies on
  if (end_output == 0) return;
  // Where row i of the product lies in an image of out, -1 where it does not.
  const auto place_of = [&](int i) {
    const int pixel = 16 * own_product + i;
    const int row = top + pixel / op.columns, column = left + pixel % op.columns;
    const bool inside =
        pixel < op.rows * op.columns && row < op.out_height && column < op.out_width;
    return inside ? int64_t{row} * op.out_width + column : int64_t{-1};
  };
  const int first_output = output + own_output;
  if (op.residual) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t place = place_of((lane >> 2) + 8 * half);
      const T* const from = x + place * op.inputs + first_output + pair;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (place < 0 || 8 * j + pair >= wanted) continue;
        if (op.aligned_x) {
          const float2 before = load_pair(from + 8 * j);
          sums[j][2 * half] += before.x;
          sums[j][2 * half + 1] += before.y;
        } else {
          sums[j][2 * half] += to_float(from[8 * j]);
          if (8 * j + pair + 1 < wanted) sums[j][2 * half + 1] += to_float(from[8 * j + 1]);
        }
      }
    }
  }
  const int64_t place = place_of(lane & 15);
  const int64_t of_image = image * op.out_height * op.out_width;
  T* const target = op.out + (of_image + place) * op.outputs + first_output;
  store_rows<T, 8 * kTiles>(sums, {1.f, 1.f}, xs + warp * 16 * kRowStride<T, 8 * kTiles>,
                            place < 0 ? nullptr : target, lane, wanted, op.aligned_out);
}

constexpr int64_t kEnoughBlocks = 132;  // for an H100

template <class T>
int warps_of(const Problem<T>& op) {
  return std::max(op.near_products, 2 * op.own_products);
}

template <class T, int kTiles>
int64_t shared_bytes(const Problem<T>& op) {
  const int64_t near = 16 * op.near_products, own = op.stride == 0 ? 0 : 16 * op.own_products;
  const int64_t tile =
      (near + kChunk<T>)*op.slice_stride() + (16 * kTiles + near + own) * kChunkStride<T>;
  const int64_t staging = int64_t{16} * warps_of(op) * kRowStride<T, 8 * kTiles>;
  return kMostNear * int64_t{sizeof(int)} + std::max(tile, staging) * int64_t{sizeof(T)};
}

// The largest tile that fits, or a smaller one where blocks are few. All are of whole runs.
template <class T, int kTiles>
cudaError_t launch_tiles(Problem<T> op, int64_t batch, cudaStream_t stream) {
  constexpr int kSizes[3][3][2] = {
      {{1, 64}, {1, 32}, {1, 16}}, {{8, 8}, {4, 8}, {4, 4}}, {{4, 4}, {2, 4}, {1, 4}}};
  const int64_t parts = ceil_div(op.outputs, 16 * kTiles);
  for (const auto& size : kSizes[op.stride]) {
    op.set_tile(size[0], size[1]);
    if (shared_bytes<T, kTiles>(op) > kSharedLimit) continue;
    if (batch * op.tiles * parts >= kEnoughBlocks) break;
  }
  return launch_blocks(inverted_bottleneck_kernel<T, kTiles>, batch * op.tiles * parts,
                       32 * warps_of(op), shared_bytes<T, kTiles>(op), stream, op);
}

template <class T>
cudaError_t run(const InvertedBottleneckTensors& t, const InvertedBottleneckShape& shape,
                cudaStream_t stream) {
  const auto is_aligned = [](const void* p, int64_t row) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && row % kWidestVector<T> == 0;
  };
  const auto input = [](const void* p) { return static_cast<const T*>(p); };
  const auto number = [](int64_t n) { return static_cast<int>(n); };
  Problem<T> op = {};
  op.x = input(t.x);
  op.expand = input(t.expand);
  op.expand_bias = input(t.expand_bias);
  op.depthwise = input(t.depthwise);
  op.depthwise_bias = input(t.depthwise_bias);
  op.project = input(t.project);
  op.project_bias = input(t.project_bias);
  op.out = static_cast<T*>(t.out);
  op.height = number(shape.height);
  op.width = number(shape.width);
  op.stride = number(shape.stride);
  op.out_height = number(shape.out_height());
  op.out_width = number(shape.out_width());
  if (t.depthwise == nullptr) {
    op.stride = 0;
    op.height = op.out_height = 1;
    op.width = op.out_width = number(shape.height * shape.width);
  }
  op.inputs = number(shape.inputs);
  op.hidden = number(shape.hidden);
  op.outputs = number(shape.outputs);
  op.residual = shape.residual;
  op.act1 = shape.act1;
  op.act2 = shape.act2;
  op.slice = std::min(number(ceil_div(shape.inputs, 16) * 16), kMostSlice<T>);
  op.slices = number(ceil_div(shape.inputs, op.slice));
  op.aligned_x = is_aligned(t.x, shape.inputs);
  op.aligned_expand = is_aligned(t.expand, shape.inputs);
  op.aligned_project = is_aligned(t.project, shape.hidden);
  op.aligned_out = is_aligned(t.out, shape.outputs);
  if (shape.outputs <= 32) return launch_tiles<T, 2>(op, shape.batch, stream);
  if (shape.outputs <= 64) return launch_tiles<T, 4>(op, shape.batch, stream);
  if (shape.outputs <= 128) return launch_tiles<T, 8>(op, shape.batch, stream);
  return launch_tiles<T, 12>(op, shape.batch, stream);
}

}  // namespace

cudaError_t inverted_bottleneck(const InvertedBottleneckTensors& tensors,
                                const InvertedBottleneckShape& shape, DType dtype,
                                cudaStream_t stream) {
  if (shape.batch == 0) return cudaSuccess;
  if (shape.height * shape.width >= int64_t{1} << 30) return cudaErrorInvalidValue;
  return channel_passes::with_element(
      dtype, [&](auto element) { return run<decltype(element)>(tensors, shape, stream); });
}

}  // namespace kernelpose::cuda
