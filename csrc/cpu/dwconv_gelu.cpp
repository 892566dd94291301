// Depthwise 3x3 convolution and GELU of tokens on the CPU. A task takes some channels of an image,
// block by block of 2 x 6 pixels: first z of all the channels, vector by vector, the sums of the
// block in registers; then, from the L1 cache, GELU.
//
// The backward pass recomputes z from x. g goes into a ring of rows, two of which are made, and
// summed with x into the weights' gradients, before the gradients of x one row above.
#include "dwconv_gelu.h"

#include <algorithm>
#include <atomic>

#include "channel_passes.h"
#include "gelu.h"
#include "part_vector.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

// Of a task: as many as the first level holds with a block and the weights, for what lies together
// in memory comes sooner.
constexpr int64_t kMostChannels = 512, kLeastChannels = 64;
constexpr int kRows = 2, kLargestBlock = kRows * 6;  // of a block; its pixels
constexpr int kRing = kRows + 2;                     // rows that a block reads

// Channels [first, first + count) of a task; `chunk` is count in whole vectors, at most.
struct Channels {
  int64_t first, count, chunk;
};

template <class T>
struct Chunks {
  int64_t channels, chunk;

  // `wanted` of them, as far as they are neither large nor small.
  Chunks(int64_t channels, int64_t wanted) : channels(channels) {
    const int64_t least = (channels + kMostChannels - 1) / kMostChannels;
    const int64_t most = (channels + kLeastChannels - 1) / kLeastChannels;
    const int64_t parts = std::max(least, std::min(wanted, most));
    chunk = round_up((channels + parts - 1) / parts, kWidth<T>);
  }
  int64_t count() const { return (channels + chunk - 1) / chunk; }
  Channels at(int64_t i) const { return {i * chunk, std::min(chunk, channels - i * chunk), chunk}; }
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
struct Forward {
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

template <class Element>
struct Backward {
  using T = Compute<Element>;
  const DwconvGeluShape& shape;
  const Element* grad_out;
  const Element* x;
  const T* weight;
  const T* bias;
  T* partial;
  Element* grad_x;

  static int64_t scratch(const DwconvGeluShape& shape, int64_t chunk) {
    return (2 * kDwconvSums + 1 + kLargestBlock + kRing * shape.width) * chunk;
  }

  void run(int64_t image, const Channels& own, T* memory) const {
    T* const taps = memory;
    T* const sums = taps + kDwconvSums * own.chunk;
    T* const zeros = sums + kDwconvSums * own.chunk;
    T* const z = zeros + own.chunk;                 // of a block, and then g
    T* const ring = z + kLargestBlock * own.chunk;  // rows of g: the last kRing that were made
    arrange(weight, bias, own, taps);
    std::fill(sums, z, T(0));
    const int64_t stride = shape.channels, row = shape.width * stride;
    const int64_t at = image * shape.image() + own.first;
    const auto row_of_g = [&](int64_t y) { return ring + y % kRing * shape.width * own.chunk; };

    // g of a block, and what it adds to the sums.
    const auto inner = [&](auto size, int64_t y, int64_t w, int64_t c, int64_t c_end, auto lanes) {
      constexpr int kBlockRows = decltype(size)::rows, kPixels = decltype(size)::pixels;
      const Neighbours<Element, kBlockRows, kPixels> from(
          shape, y, w, stride, reinterpret_cast<const Element*>(zeros),
          [&](int64_t h) { return x + at + h * row; });
      convolve<false>(from, taps, taps + kDwconvTaps * own.chunk, own.chunk, c, c_end, lanes,
                      [z, chunk = own.chunk](int r, int p, int64_t i, Vector<T> sum) {
                        store(z + (r * kPixels + p) * chunk + i, sum);
                      });
      for (int r = 0; r < kBlockRows; ++r) {
        for (int p = 0; p < kPixels; ++p) {
          derive(grad_out + at + (y + r) * row + (w + p) * stride, c, c_end, lanes,
                 z + (r * kPixels + p) * own.chunk, row_of_g(y + r) + (w + p) * own.chunk);
        }
      }
      add_products(from, z, c, c_end, lanes, sums, own.chunk);
    };
    // The gradient of x in a block.
    const auto outer = [&](auto size, int64_t y, int64_t w, int64_t c, int64_t c_end, auto lanes) {
      constexpr int kBlockRows = decltype(size)::rows, kPixels = decltype(size)::pixels;
      const Neighbours<T, kBlockRows, kPixels> from(shape, y, w, own.chunk, zeros, row_of_g);
      Element* const to = grad_x + at + y * row + w * stride;
      convolve<true>(from, taps, zeros, own.chunk, c, c_end, Whole{},
                     [=](int r, int p, int64_t i, Vector<T> sum) {
                       lanes.write(to + r * row + p * stride + i, sum);
                     });
    };

    int64_t written = 0;
    for (int64_t y = 0; y < shape.height; y += kRows) {
      const int64_t end = std::min(shape.height, y + kRows);
      for_blocks<T>(y, end - y, shape.width, own.count, inner);
      const int64_t known = end == shape.height ? end : end - 1;  // rows with both neighbours
      while (written < known) {
        const int64_t rows = std::min<int64_t>(kRows, known - written);
        for_blocks<T>(written, rows, shape.width, own.count, outer);
        written += rows;
      }
    }
    T* const to = partial + image * kDwconvSums * shape.channels + own.first;
    for (int k = 0; k < kDwconvSums; ++k) {
      std::copy_n(sums + k * own.chunk, own.count, to + k * shape.channels);
    }
  }

  // z = to = GELU'(z) incoming
  template <class Lanes>
  [[gnu::noinline]] static void derive(const Element* incoming, int64_t c, int64_t end,
                                       const Lanes& lanes, T* z, T* to) {
    const GeluDerivative<T> gelu_derivative;
    for (; c < end; c += kWidth<T>) {
      const Vector<T> g = gelu_derivative(load(z + c)) * lanes.read(incoming + c);
      store(z + c, g);
      store(to + c, g);
    }
  }

  // sums[t] += over a block's pixels g x at tap t, and of the bias g.
  template <int kBlockRows, int kPixels, class Lanes>
  [[gnu::noinline]] static void add_products(const Neighbours<Element, kBlockRows, kPixels>& from,
                                             const T* block, int64_t c, int64_t end,
                                             const Lanes& lanes, T* sums, int64_t chunk) {
    for (; c < end; c += kWidth<T>) {
      Vector<T> g[kBlockRows][kPixels], products[kDwconvSums] = {};
#pragma GCC unroll 2
      for (int r = 0; r < kBlockRows; ++r) {
#pragma GCC unroll 6
        for (int p = 0; p < kPixels; ++p) {
          g[r][p] = load(block + (r * kPixels + p) * chunk + c);
          products[kDwconvTaps] += g[r][p];
        }
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
              if (dy >= 0 && dy < 3 && dx >= 0 && dx < 3) products[dy * 3 + dx] += value * g[r][p];
            }
          }
        }
      }
#pragma GCC unroll 10
      for (int k = 0; k < kDwconvSums; ++k) {
        T* const to = sums + k * chunk + c;
        store(to, load(to) + products[k]);
      }
    }
  }
};

// Into how many each of `parts` is to be cut, so that all threads are busy to the end.
int64_t tasks_wanted(int64_t parts, int threads) {
  return threads > 1 ? (4 * threads + parts - 1) / parts : 1;
}

// run(task, scratch) for each task; false where there is no memory.
template <class T, class Run>
bool run_tasks(int64_t tasks, int threads, int64_t scratch, const Run& run) {
  std::atomic<bool> ran = true;
  parallel_for(tasks, threads, [&](int64_t task) {
    T* const memory = static_cast<T*>(thread_scratch(scratch * sizeof(T)));
    if (memory) {
      run(task, memory);
    } else {
      ran = false;
    }
  });
  return ran;
}

}  // namespace

bool dwconv_gelu_forward(const void* x, const void* weight, const void* bias, void* out,
                         const DwconvGeluShape& shape, DType dtype, int threads) {
  bool ran = false;
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    using T = Compute<Element>;
    prefer_huge_pages(out, shape.batch * shape.image() * sizeof(Element));
    const Forward<Element> op{shape, static_cast<const Element*>(x), static_cast<const T*>(weight),
                              static_cast<const T*>(bias), static_cast<Element*>(out)};
    const Chunks<T> chunks(shape.channels, tasks_wanted(shape.batch, threads));
    const int64_t parts = shape.batch * chunks.count();
    // Strips of rows where there are too few parts.
    const int64_t strips =
        std::max<int64_t>(1, std::min(tasks_wanted(parts, threads), shape.height / 4));
    ran = run_tasks<T>(
        parts * strips, threads, op.scratch(shape, chunks.chunk), [&](int64_t task, T* memory) {
          const int64_t part = task / strips, strip = task % strips;
          op.run(part / chunks.count(), chunks.at(part % chunks.count()),
                 strip * shape.height / strips, (strip + 1) * shape.height / strips, memory);
        });
  });
  return ran;
}

bool dwconv_gelu_backward(const void* grad_out, const void* x, const void* weight, const void* bias,
                          void* partial, void* grad_x, const DwconvGeluShape& shape, DType dtype,
                          int threads) {
  bool ran = false;
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    using T = Compute<Element>;
    prefer_huge_pages(grad_x, shape.batch * shape.image() * sizeof(Element));
    const Backward<Element> op{shape,
                               static_cast<const Element*>(grad_out),
                               static_cast<const Element*>(x),
                               static_cast<const T*>(weight),
                               static_cast<const T*>(bias),
                               static_cast<T*>(partial),
                               static_cast<Element*>(grad_x)};
    const Chunks<T> chunks(shape.channels, tasks_wanted(shape.batch, threads));
    ran = run_tasks<T>(shape.batch * chunks.count(), threads, op.scratch(shape, chunks.chunk),
                       [&](int64_t task, T* memory) {
                         op.run(task / chunks.count(), chunks.at(task % chunks.count()), memory);
                       });
  });
  return ran;
}

}  // namespace kernelpose::cpu::KP_ISA
