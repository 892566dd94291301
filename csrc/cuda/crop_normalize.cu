// A block makes a tile of 1024 neighbouring pixels of one crop, in two steps:
//
//   a thread a pixel     four pixels of the image, interpolated and rounded: 3 bytes to shared
//   memory a thread 16 bytes    4 (float) or 8 neighbours of one plane, normalised and stored
//
// In the first, neighbouring lanes read neighbouring pixels of the image, a line or two of the
// cache a load; in the second they write whole lines. Between them lies the transposition.
//
// Floor: the crops written once, 3 * pixels * sizeof(T) bytes a person; the images come from L2,
// where a person's part of them is read by a few blocks. Shared memory: 3 KiB and a warp's numbers.
// budget: crop_kernel<float> registers<=48
// budget: crop_kernel<16-bit> registers<=48
#include <climits>

#include "crop_normalize.h"
#include "kernelpose/launch.cuh"
#include "kernelpose/numerics.cuh"
#include "kernelpose/vector.cuh"

namespace kernelpose::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 1024;      // pixels
constexpr int kSharedWarp = 32;  // bytes, so that what follows is aligned
static_assert(sizeof(Warp) <= kSharedWarp);

template <class T>
struct Arguments {
  ImageSet images;
  Persons persons;
  T* crops;
  CropShape shape;
  int tiles;     // of a crop
  bool aligned;  // planes start at multiples of 16 bytes
};

// The largest integer that is not above x, and how far x is above it; what lies outside [-2, size]
// is moved there, where both neighbours are black.
__device__ __forceinline__ int split(float x, int size, float& fraction) {
  x = fminf(fmaxf(x, -2.f), static_cast<float>(size));
  const float whole = floorf(x);
  fraction = x - whole;
  return static_cast<int>(whole);
}

// column * along + (row * down + start), rounded at each step and never contracted, as the
// reference has it.
__device__ __forceinline__ float coordinate(float column, float along, float row, float down,
                                            float start) {
  return __fadd_rn(__fmul_rn(column, along), __fadd_rn(__fmul_rn(row, down), start));
}

__device__ __forceinline__ bool within(int i, int size) {
  return static_cast<unsigned>(i) < static_cast<unsigned>(size);
}

// Rounded grey levels of the crop at (column, row), kTile bytes apart.
__device__ __forceinline__ void interpolate(const Image& image, const Warp& warp, int column,
                                            int row, unsigned char* levels) {
  const float c = static_cast<float>(column), r = static_cast<float>(row);
  float along, down;
  const int x = split(coordinate(c, warp.xx, r, warp.xy, warp.x0), image.width, along);
  const int y = split(coordinate(c, warp.yx, r, warp.yy, warp.y0), image.height, down);
  const bool left = within(x, image.width), right = within(x + 1, image.width);
  const bool upper = within(y, image.height), lower = within(y + 1, image.height);
  const uint8_t* const from = image.pixels + y * image.row + x * image.pixel;
#pragma unroll
  for (int plane = 0; plane < 3; ++plane) {
    const uint8_t* const p = from + plane * image.channel;
    const float a = upper && left ? p[0] : 0, b = upper && right ? p[image.pixel] : 0;
    const float d = lower && left ? p[image.row] : 0;
    const float e = lower && right ? p[image.row + image.pixel] : 0;
    const float top = a + along * (b - a), bottom = d + along * (e - d);
    levels[plane * kTile] = static_cast<unsigned char>(rintf(top + down * (bottom - top)));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 5) crop_kernel(const Arguments<T> args) {
  KP_DYNAMIC_SHARED(unsigned char, shared);
  Warp* const shared_warp = reinterpret_cast<Warp*>(shared);
  unsigned char* const levels = shared + kSharedWarp;  // (3, kTile)
  const CropShape& shape = args.shape;
  const int64_t person = blockIdx.x / args.tiles;
  const int tile = blockIdx.x % args.tiles, first = tile * kTile;
  const int count = min(kTile, shape.pixels() - first);

  if (threadIdx.x == 0) {
    const Placement placement = place_crop(shape, args.persons, args.images.count, person);
    *shared_warp = placement.warp;
    if (tile == 0) {
#pragma unroll
      for (int axis = 0; axis < 2; ++axis) {
        args.persons.centers[2 * person + axis] = placement.center[axis];
        args.persons.scales[2 * person + axis] = placement.scale[axis];
      }
    }
  }
  __syncthreads();

  const Warp warp = *shared_warp;
  if (warp.usable) {
    const Image image = args.images.at(args.persons.image_index[person]);
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int row = (first + i) / shape.width, column = first + i - row * shape.width;
      interpolate(image, warp, column, row, levels + i);
    }
  } else {
    for (int i = threadIdx.x; i < 3 * kTile; i += kThreads) levels[i] = 0;
  }
  __syncthreads();

  constexpr int kVector = kWidestVector<T>, kChunks = kTile / kVector;
  for (int i = threadIdx.x; i < 3 * kChunks; i += kThreads) {
    const int plane = i / kChunks, start = i % kChunks * kVector;
    if (start >= count) continue;
    const auto* const words = reinterpret_cast<const uint32_t*>(levels + plane * kTile + start);
    T* const to = args.crops + (person * 3 + plane) * shape.pixels() + first + start;
    const float factor = shape.factor[plane], offset = shape.offset[plane];
    ElementVector<T, kVector> vector;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const uint32_t level = words[j / 4] >> (8 * (j % 4)) & 255;
      vector.values[j] = from_float<T>(static_cast<float>(level) * factor + offset);
    }
    if (args.aligned && start + kVector <= count) {
      store_vector(to, vector);
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (start + j < count) to[j] = vector.values[j];
      }
    }
  }
}

template <class T>
cudaError_t run(const ImageSet& images, const Persons& persons, void* crops, const CropShape& shape,
                cudaStream_t stream) {
  Arguments<T> args = {images, persons, static_cast<T*>(crops), shape, 0, false};
  args.tiles = (shape.pixels() + kTile - 1) / kTile;
  args.aligned =
      shape.pixels() * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(crops) % 16 == 0;
  const int64_t blocks = shape.persons * args.tiles;
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  return launch(crop_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                kSharedWarp + 3 * kTile, stream, args);
}

}  // namespace

cudaError_t crop_normalize(const ImageSet& images, const Persons& persons, void* crops,
                           const CropShape& shape, DType dtype, cudaStream_t stream) {
  switch (dtype) {
    case DType::kFloat32:
      return run<float>(images, persons, crops, shape, stream);
    case DType::kFloat16:
      return run<__half>(images, persons, crops, shape, stream);
    case DType::kBFloat16:
      return run<__nv_bfloat16>(images, persons, crops, shape, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace kernelpose::cuda
