// What the kernels of multi_granularity share. They take maps in tiles of kRows x 12 pixels. A
// channel of a tile lies in shared memory as a plane, with its margin and zeros beyond the map:
//
//            4 columns    12 columns     4 columns
//   3 rows   . m m m   m m m ... m m m   m m m .
//   kRows    . m m m   own pixels        m m m .     a thread has one row of one channel
//   3 rows   . m m m   m m m ... m m m   m m m .
//
// Rows begin at four elements, which a thread reads at a time. Planes are laid so that a warp's
// reads meet no bank twice: of 8 rows of channels 4 planes apart, of 16 neighbouring channels, and
// of the 2 rows of a low tile of 8 channels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "kernelpose/launch.cuh"
#include "kernelpose/numerics.cuh"
#include "kernelpose/vector.cuh"
#include "multi_granularity.h"

namespace kernelpose::cuda::granularity {

constexpr int kTileColumns = 12;
constexpr int kPitch = kTileColumns + 8;  // of a plane's rows
constexpr int kBefore = 4;                // columns of a plane before the tile's own

template <int kRows>
constexpr int kPlaneRows = kRows + 2 * kLargestMargin;

// Elements from one plane to the next, but kSkew more after every eighth.
template <class T, int kRows>
constexpr int kPlane = kRows == 8 ? (sizeof(T) == 4 ? 284 : 280) : 168;
constexpr int kSkew = 4;

template <class T, int kRows>
KP_HOST_DEVICE constexpr int plane_at(int channel) {
  static_assert(kPlane<T, kRows> >= kPlaneRows<kRows> * kPitch);
  return channel * kPlane<T, kRows> + channel / 8 * kSkew;
}

KP_HOST_DEVICE constexpr int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }
KP_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes of `count` elements, so that what follows them begins at 16.
template <class T>
KP_HOST_DEVICE constexpr int bytes_of(int count) {
  return round_up(count * static_cast<int>(sizeof(T)), 16);
}

constexpr int kSharedLimit = 163 * 1024;  // of a block, on sm_80; on sm_90 it is 227 KB

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Maps and their tiles.
struct TiledMaps {
  int channels, height, width;
  bool channels_last;
  bool vectors;           // 16 bytes of a pixel's channels, or four pixels of a row, are one access
  int rows, wide, tiles;  // rows of a tile; tiles next to each other and of an image
  int64_t count;          // of tiles in all

  TiledMaps(const MultiGranularityShape& shape, int tile_rows, bool aligned)
      : channels(static_cast<int>(shape.maps.channels)),
        height(static_cast<int>(shape.height())),
        width(static_cast<int>(shape.width)),
        channels_last(shape.maps.channels_last),
        vectors(aligned),
        rows(tile_rows),
        wide(static_cast<int>(ceil_div(width, kTileColumns))),
        tiles(static_cast<int>(wide * ceil_div(height, rows))),
        count(shape.maps.batch * tiles) {}

  KP_HOST_DEVICE int pixels() const { return height * width; }
  KP_HOST_DEVICE int64_t image() const { return int64_t{1} * channels * pixels(); }
  __device__ __forceinline__ bool has(int h, int w) const {
    return h >= 0 && h < height && w >= 0 && w < width;
  }
  __device__ __forceinline__ int place(int channel, int h, int w) const {
    const int pixel = h * width + w;
    return channels_last ? pixel * channels + channel : channel * pixels() + pixel;
  }
};

struct PixelTile {
  int64_t image;
  int top, left;

  __device__ __forceinline__ PixelTile(const TiledMaps& maps, int64_t which)
      : image(which / maps.tiles) {
    const int of_image = static_cast<int>(which % maps.tiles);
    top = of_image / maps.wide * maps.rows;
    left = of_image % maps.wide * kTileColumns;
  }
};

inline bool fits(const MultiGranularityShape& shape) {
  return shape.maps.image() <= INT32_MAX && shape.group_channels() <= kMaxGroupChannels;
}

// Whether maps of these pointers can be read by vectors; `unit` channels lie together.
template <class T>
bool by_vectors(const MultiGranularityShape& shape, int64_t unit,
                std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return shape.maps.channels_last ? unit % kWidestVector<T> == 0 : shape.width % 4 == 0;
}

// By the whole block: kRows x kColumns pixels from (top, left) on of `padded` channels, a multiple
// of 8, from `first` on, to the `pitch` of rows at planes + at(channel). Zeros where there is no
// pixel, and for channels from `count` on.
template <int kRows, int kColumns, class T, class At>
__device__ __forceinline__ void read_planes(const TiledMaps& maps, const T* image, int first,
                                            int count, int padded, int top, int left, T* planes,
                                            const At& at, int pitch) {
  static_assert(kColumns % 4 == 0);
  const T zero = from_float<T>(0.f);
  if (maps.vectors && maps.channels_last) {
    constexpr int n = kWidestVector<T>, kPairs = kColumns / 2;
    for (int i = threadIdx.x; i < padded / n * kRows * kPairs; i += blockDim.x) {
      const int pair = i % kPairs, row = i / kPairs % kRows, c = i / (kPairs * kRows) * n;
      ElementVector<T, n> of[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int h = top + row, w = left + 2 * pair + k;
        if (c < count && maps.has(h, w)) {
          of[k] = load_vector<n>(image + maps.place(first + c, h, w));
        } else {
#pragma unroll
          for (int e = 0; e < n; ++e) of[k].values[e] = zero;
        }
      }
#pragma unroll
      for (int e = 0; e < n; ++e) {
        store_vector(planes + at(c + e) + row * pitch + 2 * pair,
                     ElementVector<T, 2>{of[0].values[e], of[1].values[e]});
      }
    }
  } else if (maps.vectors) {
    constexpr int kQuads = kColumns / 4;
    for (int i = threadIdx.x; i < padded * kRows * kQuads; i += blockDim.x) {
      const int quad = i % kQuads, row = i / kQuads % kRows, c = i / (kQuads * kRows);
      const int h = top + row, w = left + 4 * quad;
      ElementVector<T, 4> read = {zero, zero, zero, zero};
      if (c < count && maps.has(h, w)) read = load_vector<4>(image + maps.place(first + c, h, w));
      store_vector(planes + at(c) + row * pitch + 4 * quad, read);
    }
  } else {
    constexpr int kPixels = kRows * kColumns;
    for (int i = threadIdx.x; i < padded * kPixels; i += blockDim.x) {
      const int c = maps.channels_last ? i % padded : i / kPixels;
      const int pixel = maps.channels_last ? i / padded : i % kPixels;
      const int row = pixel / kColumns, column = pixel % kColumns;
      const int h = top + row, w = left + column;
      const bool exists = c < count && maps.has(h, w);
      planes[at(c) + row * pitch + column] = exists ? image[maps.place(first + c, h, w)] : zero;
    }
  }
}

// The planes of a tile, margins included.
template <int kRows, class T>
__device__ __forceinline__ void read_tile(const TiledMaps& maps, const T* image,
                                          const PixelTile& tile, int first, int count, int padded,
                                          T* planes) {
  read_planes<kPlaneRows<kRows>, kPitch>(
      maps, image, first, count, padded, tile.top - kLargestMargin, tile.left - kBefore, planes,
      [](int c) { return plane_at<T, kRows>(c); }, kPitch);
}

// By the whole block: out = sums + added for a tile of `count` channels from `first` on, of images
// that begin at out and added; a channel's sums are `stride` numbers apart.
template <int kRows, class T>
__device__ __forceinline__ void write_tile(const TiledMaps& maps, const PixelTile& tile, int first,
                                           int count, const float* sums, int stride, const T* added,
                                           T* out) {
  constexpr int kPixels = kRows * kTileColumns;
  if (maps.vectors && maps.channels_last) {
    constexpr int n = kWidestVector<T>;
    const int vectors = count / n;
    for (int i = threadIdx.x; i < vectors * kPixels; i += blockDim.x) {
      const int c = i % vectors * n, pixel = i / vectors;
      const int h = tile.top + pixel / kTileColumns, w = tile.left + pixel % kTileColumns;
      if (!maps.has(h, w)) continue;
      const int at = maps.place(first + c, h, w);
      ElementVector<T, n> result = load_vector<n>(added + at);
#pragma unroll
      for (int e = 0; e < n; ++e) {
        const float sum = sums[(c + e) * stride + pixel] + to_float(result.values[e]);
        result.values[e] = from_float<T>(sum);
      }
      store_vector(out + at, result);
    }
  } else if (maps.vectors) {
    for (int i = threadIdx.x; i < count * kPixels / 4; i += blockDim.x) {
      const int c = i / (kPixels / 4), pixel = i % (kPixels / 4) * 4;
      const int h = tile.top + pixel / kTileColumns, w = tile.left + pixel % kTileColumns;
      if (!maps.has(h, w)) continue;
      const int at = maps.place(first + c, h, w);
      ElementVector<T, 4> result = load_vector<4>(added + at);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float sum = sums[c * stride + pixel + e] + to_float(result.values[e]);
        result.values[e] = from_float<T>(sum);
      }
      store_vector(out + at, result);
    }
  } else {
    for (int i = threadIdx.x; i < count * kPixels; i += blockDim.x) {
      const int c = maps.channels_last ? i % count : i / kPixels;
      const int pixel = maps.channels_last ? i / count : i % kPixels;
      const int h = tile.top + pixel / kTileColumns, w = tile.left + pixel % kTileColumns;
      if (!maps.has(h, w)) continue;
      const int at = maps.place(first + c, h, w);
      out[at] = from_float<T>(sums[c * stride + pixel] + to_float(added[at]));
    }
  }
}

// By the whole block: a tile of `count` channels from `first` on to an image of contiguous maps; a
// channel's pixels are `stride` elements apart.
template <int kRows, class T>
__device__ __forceinline__ void write_planes(const TiledMaps& maps, const PixelTile& tile,
                                             int first, int count, const T* planes, int stride,
                                             T* image) {
  constexpr int kPixels = kRows * kTileColumns;
  const auto write = [&](auto vector) {
    constexpr int n = decltype(vector)::value;
    for (int i = threadIdx.x; i < count * kPixels / n; i += blockDim.x) {
      const int c = i / (kPixels / n), pixel = i % (kPixels / n) * n;
      const int h = tile.top + pixel / kTileColumns, w = tile.left + pixel % kTileColumns;
      if (!maps.has(h, w)) continue;
      store_vector(image + maps.place(first + c, h, w),
                   load_vector<n>(planes + c * stride + pixel));
    }
  };
  if (maps.vectors) {
    write(std::integral_constant<int, 4>{});
  } else {
    write(std::integral_constant<int, 1>{});
  }
}

// A channel's taps in shared memory: row dy of the largest kernel, then that of the others, which
// lie in its middle; each begins at four numbers.
KP_HOST_DEVICE constexpr int tap_row(int dy) {
  return dy < 2 ? 8 * dy : dy < 3 ? 20 : dy < 6 ? 20 + 16 * (dy - 2) : 80 + 8 * (dy - 6);
}
KP_HOST_DEVICE constexpr int tap_column(int branch) {
  return branch * (kLargestKernel + 1 - branch);  // 7 + 5 + ...
}
constexpr int kTapSpace = tap_row(kLargestKernel);

// Whether a branch has a row dy (or a column) of the largest kernel.
KP_HOST_DEVICE constexpr bool reaches(int branch, int dy) {
  return dy >= branch && dy < kLargestKernel - branch;
}

// By the whole block.
__device__ __forceinline__ void read_taps(const float* const (&weights)[kBranches], int first,
                                          int count, int padded, float* taps) {
#pragma unroll
  for (int b = 0; b < kBranches; ++b) {
    const int side = branch_side(b), size = side * side;
    for (int i = threadIdx.x; i < padded * size; i += blockDim.x) {
      const int c = i / size, t = i % size;
      taps[c * kTapSpace + tap_row(t / side + b) + tap_column(b) + t % side] =
          c < count ? weights[b][int64_t{1} * (first + c) * size + t] : 0.f;
    }
  }
}

// What a thread takes of a tile: row `row` of channel `channel`.
template <int kRows>
struct RowOfTile {
  int channel, row;

  __device__ __forceinline__ RowOfTile() {
    if (kRows == 8) {  // a warp has 8 rows of 4 channels, each half of it of two that are 4 apart
      const int warp = threadIdx.x / 32, part = threadIdx.x % 32 / 8;
      channel = warp / 2 * 8 + warp % 2 * 2 + part % 2 * 4 + part / 2;
    } else {
      channel = threadIdx.x / kRows;
    }
    row = threadIdx.x % kRows;
  }
};

template <int N, class T>
__device__ __forceinline__ void load_floats(float (&to)[N], const T* from) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const ElementVector<T, 4> four = load_vector<4>(from + i);
#pragma unroll
    for (int e = 0; e < 4; ++e) to[i + e] = to_float(four.values[e]);
  }
}

__device__ __forceinline__ void load_tap_row(float (&to)[16], const float* taps, int dy) {
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    if (i < tap_row(dy + 1) - tap_row(dy)) {
      const ElementVector<float, 4> four = load_vector<4>(taps + tap_row(dy) + i);
#pragma unroll
      for (int e = 0; e < 4; ++e) to[i + e] = four.values[e];
    }
  }
}

// sum += D of a row of pixels; `rows`: the plane's, from the first that the row needs.
template <class T>
__device__ __forceinline__ void convolve_row(float (&sum)[kBranches][kTileColumns], const T* rows,
                                             const float* taps) {
#pragma unroll
  for (int dy = 0; dy < kLargestKernel; ++dy) {
    float x[kPitch], tap[16];
    load_floats(x, rows + dy * kPitch);
    load_tap_row(tap, taps, dy);
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
      if (!reaches(b, dy)) continue;
#pragma unroll
      for (int dx = b; dx < kLargestKernel - b; ++dx) {
#pragma unroll
        for (int i = 0; i < kTileColumns; ++i) {
          sum[b][i] =
              fmaf(x[i + dx + kBefore - kLargestMargin], tap[tap_column(b) + dx - b], sum[b][i]);
        }
      }
    }
  }
}

// The branches of this thread's row, of channel `of_all`, to branches + b * branch, for each b.
template <int kRows, class T>
__device__ __forceinline__ void convolve(const RowOfTile<kRows>& own, const T* planes,
                                         const float* taps, const float* const (&biases)[kBranches],
                                         int of_all, bool exists, T* branches, int branch) {
  float sum[kBranches][kTileColumns];
#pragma unroll
  for (int b = 0; b < kBranches; ++b) {
    const float bias = exists ? biases[b][of_all] : 0.f;
#pragma unroll
    for (int i = 0; i < kTileColumns; ++i) sum[b][i] = bias;
  }
  convolve_row(sum, planes + plane_at<T, kRows>(own.channel) + own.row * kPitch,
               taps + own.channel * kTapSpace);
#pragma unroll
  for (int b = 0; b < kBranches; ++b) {
#pragma unroll
    for (int i = 0; i < kTileColumns; i += 4) {
      ElementVector<T, 4> four;
#pragma unroll
      for (int e = 0; e < 4; ++e) four.values[e] = from_float<T>(sum[b][i + e]);
      store_vector(branches + b * branch + own.row * kTileColumns + i, four);
    }
  }
}

}  // namespace kernelpose::cuda::granularity
