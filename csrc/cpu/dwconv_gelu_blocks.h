// Depthwise 3x3 convolution and GELU of tokens, block by block of 2 x 6 pixels: first z of all the
// channels, vector by vector, the sums of the block in registers; then, from the L1 cache, GELU.
#pragma once

#include <algorithm>

#include "gelu.h"
#include "kernelpose/dwconv_gelu.h"
#include "part_vector.h"

namespace kernelpose::cpu::KP_ISA {

constexpr int kRows = 2, kLargestBlock = kRows * 6;  // of a block; its pixels

// Channels [first, first + count) of a task; `chunk` is count in whole vectors, at most.
struct Channels {
  int64_t first, count, chunk;
};

// How vectors of channels are read and written: whole ones, or the last channels of all.
struct Whole {
  template <class Element>
  Vector<Compute<Element>> read(const Element* from) const {
    return load_elements(from);
  }
  template <class Element>
  void write(Element* to, Vector<Compute<Element>> values) const {
    store_elements(to, values);
  }
};
struct Part {
  int count;

  template <class Element>
  Vector<Compute<Element>> read(const Element* from) const {
    return load_part(from, count);
  }
  template <class Element>
  void write(Element* to, Vector<Compute<Element>> values) const {
    store_part(to, values, count);
  }
};

// The pixels of a map around a block, one pointer each; `zeros` off the map.
template <class Element, int kBlockRows, int kPixels>
struct Neighbours {
  const Element* at[kBlockRows + 2][kPixels + 2];

  // row(y) is the first pixel of a row that is on the map.
  template <class Row>
  Neighbours(const DwconvGeluShape& shape, int64_t y, int64_t x, int64_t stride,
             const Element* zeros, const Row& row) {
    for (int i = 0; i < kBlockRows + 2; ++i) {
      const int64_t h = y - 1 + i;
      const bool inside = h >= 0 && h < shape.height;
      const Element* const first = inside ? row(h) : zeros;
      for (int j = 0; j < kPixels + 2; ++j) {
        const int64_t w = x - 1 + j;
        at[i][j] = inside && w >= 0 && w < shape.width ? first + w * stride : zeros;
      }
    }
  }
};

// write(r, p, c, start + the 3x3 products around pixel p of row r of a block) for each vector of
// channels in [c, end), with taps, `chunk` numbers each; kTurned takes them in the opposite order.
// A function of its own, or what stands around it would take the registers of the sums.
template <bool kTurned, class Element, class T, int kBlockRows, int kPixels, class Lanes,
          class Write>
[[gnu::noinline]] void convolve(const Neighbours<Element, kBlockRows, kPixels>& from, const T* taps,
                                const T* start, int64_t chunk, int64_t c, int64_t end,
                                const Lanes& lanes, const Write& write) {
  for (; c < end; c += kWidth<T>) {
    Vector<T> sums[kBlockRows][kPixels], tap[kDwconvTaps];
    const Vector<T> first = load(start + c);
#pragma GCC unroll 2
    for (auto& row : sums) {
#pragma GCC unroll 6
      for (auto& sum : row) sum = first;
    }
#pragma GCC unroll 9
    for (int t = 0; t < kDwconvTaps; ++t) {
      tap[t] = load(taps + (kTurned ? kDwconvTaps - 1 - t : t) * chunk + c);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kBlockRows + 2; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kPixels + 2; ++j) {
        const Vector<T> value = lanes.read(from.at[i][j] + c);
#pragma GCC unroll 2
        for (int r = 0; r < kBlockRows; ++r) {
#pragma GCC unroll 6
          for (int p = 0; p < kPixels; ++p) {
            const int dy = i - r, dx = j - p;
            if (dy >= 0 && dy < 3 && dx >= 0 && dx < 3) sums[r][p] += value * tap[dy * 3 + dx];
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < kBlockRows; ++r) {
#pragma GCC unroll 6
      for (int p = 0; p < kPixels; ++p) write(r, p, c, sums[r][p]);
    }
  }
}

template <int kBlockRows, int kPixels>
struct BlockSize {
  static constexpr int rows = kBlockRows, pixels = kPixels;
};

// Covers `rows` rows, 1 or 2, with blocks: op.block(size, y, x, from, to, lanes) for channels
// [from, to), whole vectors, and then for the channels that are left, pixel by pixel.
template <class T, class Op>
inline void for_blocks(int64_t y, int64_t rows, int64_t width, int64_t channels, const Op& op) {
  const int64_t whole = channels / kWidth<T> * kWidth<T>;
  const auto across = [&](auto one, auto three, auto six) {
    int64_t x = 0;
    for (; x + 6 <= width; x += 6) op(six, y, x, 0, whole, Whole{});
    if (x + 3 <= width) op(three, y, x, 0, whole, Whole{}), x += 3;
    for (; x < width; ++x) op(one, y, x, 0, whole, Whole{});
  };
  if (rows == 2) {
    across(BlockSize<2, 1>{}, BlockSize<2, 3>{}, BlockSize<2, 6>{});
  } else {
    across(BlockSize<1, 1>{}, BlockSize<1, 3>{}, BlockSize<1, 6>{});
  }
  if (whole == channels) return;
  const Part rest{static_cast<int>(channels - whole)};
  for (int64_t end = y + rows; y < end; ++y) {
    for (int64_t x = 0; x < width; ++x) op(BlockSize<1, 1>{}, y, x, whole, channels, rest);
  }
}

// taps (9, chunk) and biases (chunk) from weight (channels, 9) and bias; some of the last vector's
// lanes are 0.
template <class T>
void arrange(const T* weight, const T* bias, const Channels& own, T* taps) {
  for (int64_t c = 0; c < own.chunk; ++c) {
    const bool is = c < own.count;
    const T* const from = weight + (own.first + c) * kDwconvTaps;
    for (int t = 0; t < kDwconvTaps; ++t) taps[t * own.chunk + c] = is ? from[t] : T(0);
    taps[kDwconvTaps * own.chunk + c] = is ? bias[own.first + c] : T(0);
  }
}

template <class Element>
struct DwconvGelu {
  using T = Compute<Element>;
  const DwconvGeluShape& shape;
  const Element* x;
  const T* weight;
  const T* bias;
  Element* out;

  static int64_t scratch(const DwconvGeluShape&, int64_t chunk) {
    return (kDwconvSums + 1 + kLargestBlock) * chunk;
  }

  // Rows [first, end) of some channels of an image.
  void run(int64_t image, const Channels& own, int64_t first, int64_t end, T* memory) const {
    T* const taps = memory;
    T* const zeros = taps + kDwconvSums * own.chunk;
    T* const z = zeros + own.chunk;  // of a block
    arrange(weight, bias, own, taps);
    std::fill(zeros, z, T(0));
    const int64_t stride = shape.channels, row = shape.width * stride;
    const int64_t at = image * shape.image() + own.first;
    const auto block = [&](auto size, int64_t y, int64_t w, int64_t c, int64_t c_end, auto lanes) {
      constexpr int kBlockRows = decltype(size)::rows, kPixels = decltype(size)::pixels;
      const Neighbours<Element, kBlockRows, kPixels> from(
          shape, y, w, stride, reinterpret_cast<const Element*>(zeros),
          [&](int64_t h) { return x + at + h * row; });
      convolve<false>(from, taps, taps + kDwconvTaps * own.chunk, own.chunk, c, c_end, lanes,
                      [z, chunk = own.chunk](int r, int p, int64_t i, Vector<T> sum) {
                        store(z + (r * kPixels + p) * chunk + i, sum);
                      });
      for (int r = 0; r < kBlockRows; ++r) {
        const int64_t below = std::min(y + r + kRows + 1, shape.height - 1);
        for (int p = 0; p < kPixels; ++p) {
          const int64_t pixel = at + (w + p) * stride;
          activate(z + (r * kPixels + p) * own.chunk, c, c_end, lanes, out + pixel + (y + r) * row,
                   x + pixel + below * row);
        }
      }
    };
    for (int64_t y = first; y < end; y += kRows) {
      for_blocks<T>(y, std::min<int64_t>(kRows, end - y), shape.width, own.count, block);
    }
  }

  // to = GELU(z); meanwhile `next`, which the rows below read, is fetched.
  template <class Lanes>
  [[gnu::noinline]] static void activate(const T* z, int64_t c, int64_t end, const Lanes& lanes,
                                         Element* to, const Element* next) {
    const Gelu<T> gelu;
    for (; c < end; c += kWidth<T>) {
      __builtin_prefetch(next + c, 0, 2);
      lanes.write(to + c, gelu(load(z + c)));
    }
  }
};

}  // namespace kernelpose::cpu::KP_ISA
