// Depthwise 3x3 convolution and GELU of tokens on the CPU. A task takes some channels of an image.
//
// The backward pass recomputes z from x. g goes into a ring of rows, two of which are made, and
// summed with x into the weights' gradients, before the gradients of x one row above.
#include "dwconv_gelu.h"

#include <algorithm>
#include <atomic>

#include "channel_passes.h"
#include "dwconv_gelu_blocks.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

// Of a task: as many as the first level holds with a block and the weights, for what lies together
// in memory comes sooner.
constexpr int64_t kMostChannels = 512, kLeastChannels = 64;
constexpr int kRing = kRows + 2;  // rows that a block reads

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
    const DwconvGelu<Element> op{shape, static_cast<const Element*>(x),
                                 static_cast<const T*>(weight), static_cast<const T*>(bias),
                                 static_cast<Element*>(out)};
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
