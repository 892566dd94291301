// Flip test: one pass at the speed of memory.
//
//   row of heatmaps   | v0 | v1 | v2 |      a thread: kUnroll vectors of a map, 16 bytes each
//   row of flipped    | v2'| v1'| v0'|      the mirrored vector is aligned too: it is read as it
//                                           lies and reversed in registers
//
// With a shift the mirrored vector starts one element later: its first element of the result is one
// more read, which its neighbour in the row has in the cache. A width that is no multiple of a
// vector, or a tensor that starts inside one, takes vectors of one element.
//
// Floor, per launch: both tensors read and the mean written once. The permutation of the joints
// travels among the parameters, so that no memory is allocated for it.
// budget: flip_merge_kernel<16-bit, 8> registers<=72
// budget: flip_merge_kernel<16-bit, 1> registers<=32
// budget: flip_merge_kernel<float, 4> registers<=48
// budget: flip_merge_kernel<float, 1> registers<=32
#include <cstdint>

#include "flip_merge.h"
#include "kernelpose/launch.cuh"
#include "kernelpose/numerics.cuh"
#include "kernelpose/vector.cuh"

namespace kernelpose::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kUnroll = 3;  // a map of 64 x 48 is one block of 16-bit or two of 32-bit vectors

struct JointOrder {
  uint16_t source[kMaxFlipJoints];
};

template <class T>
struct Arguments {
  const T* heatmaps;
  const T* flipped;
  T* out;
  int joints, pixels, width;
  int blocks;  // a map
  bool shift;
};

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    flip_merge_kernel(const Arguments<T> args, const __grid_constant__ JointOrder order) {
  const int64_t map = blockIdx.x / args.blocks;
  const int joint = static_cast<int>(map % args.joints);
  const T* const straight = args.heatmaps + map * args.pixels;
  const T* const mirrored = args.flipped + (map - joint + order.source[joint]) * args.pixels;
  const int first = (blockIdx.x % args.blocks * kUnroll * kThreads + threadIdx.x) * N;

  ElementVector<T, N> a[kUnroll], b[kUnroll];
  T before[kUnroll];  // with a shift: what the first element of the vector meets
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int pixel = first + u * kThreads * N;
    if (pixel >= args.pixels) break;
    const int column = pixel % args.width, row = pixel - column;
    a[u] = load_vector<N>(straight + pixel);
    b[u] = load_vector<N>(mirrored + row + args.width - column - N);
    if (args.shift) before[u] = mirrored[row + args.width - max(column, 1)];
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int pixel = first + u * kThreads * N;
    if (pixel >= args.pixels) break;
    ElementVector<T, N> mean;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T back = !args.shift ? b[u].values[N - 1 - i]
                     : i == 0    ? before[u]
                                 : b[u].values[N - i == N ? 0 : N - i];
      mean.values[i] = from_float<T>((to_float(a[u].values[i]) + to_float(back)) * 0.5f);
    }
    store_vector(args.out + map * args.pixels + pixel, mean);
  }
}

template <class T, int N>
cudaError_t launch_merge(Arguments<T> args, const JointOrder& order, int64_t maps,
                         cudaStream_t stream) {
  constexpr int kBlockPixels = kThreads * kUnroll * N;
  args.blocks = (args.pixels + kBlockPixels - 1) / kBlockPixels;
  const int64_t blocks = maps * args.blocks;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(flip_merge_kernel<T, N>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                stream, args, order);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T>
cudaError_t merge(const void* heatmaps, const void* flipped, void* out, const JointOrder& order,
                  int joints, const FlipMergeShape& shape, cudaStream_t stream) {
  const Arguments<T> args = {static_cast<const T*>(heatmaps),
                             static_cast<const T*>(flipped),
                             static_cast<T*>(out),
                             joints,
                             static_cast<int>(shape.pixels()),
                             static_cast<int>(shape.width),
                             0,
                             shape.shift};
  constexpr int kWidest = kWidestVector<T>;
  const bool wide = shape.width % kWidest == 0 && aligned(heatmaps) && aligned(flipped);
  if (wide && aligned(out)) return launch_merge<T, kWidest>(args, order, shape.maps, stream);
  return launch_merge<T, 1>(args, order, shape.maps, stream);
}

}  // namespace

cudaError_t flip_merge(const void* heatmaps, const void* flipped, void* out, const int* order,
                       int joints, const FlipMergeShape& shape, DType dtype, cudaStream_t stream) {
  if (joints > kMaxFlipJoints || shape.pixels() >= int64_t{1} << 30) return cudaErrorInvalidValue;
  JointOrder sources = {};
  for (int joint = 0; joint < joints; ++joint) {
    sources.source[joint] = static_cast<uint16_t>(order[joint]);
  }
  switch (dtype) {
    case DType::kFloat32:
      return merge<float>(heatmaps, flipped, out, sources, joints, shape, stream);
    case DType::kFloat16:
      return merge<__half>(heatmaps, flipped, out, sources, joints, shape, stream);
    case DType::kBFloat16:
      return merge<__nv_bfloat16>(heatmaps, flipped, out, sources, joints, shape, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace kernelpose::cuda
