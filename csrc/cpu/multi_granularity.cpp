// Depthwise convolutions of three sizes and their grouped mix on the CPU. A task takes one group of
// channels through some images: each vector of channels goes into a tile with a margin, which all
// three convolutions read, and their results are mixed while they are in the cache.
#include "multi_granularity.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "channel_passes.h"
#include "matmul.h"
#include "multi_granularity_branches.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

constexpr int64_t kStripPixels = 256;  // of an image whose results are mixed together
constexpr int64_t kStripRows = 4;      // but no fewer rows: each strip reads 6 more than it has
constexpr int64_t kSumPixels = 64;     // that are summed in registers

// Pieces of one allocation, each of whole vectors. Without memory it only measures.
template <class T>
struct Pieces {
  T* memory;
  int64_t size = 0;

  T* take(int64_t count) {
    T* const piece = memory ? memory + size : nullptr;
    size += round_up(count, kWidth<T>);
    return piece;
  }
};

// Some pixels of up to kWidth channels, one pixel after the other; lanes without a channel are 0.
// rows is scratch of as many numbers.
template <class Element>
void read_channels(const Maps& maps, const Element* image, int64_t first, int64_t count,
                   int64_t pixel, int64_t pixels, Compute<Element>* rows, Compute<Element>* to,
                   int64_t to_stride) {
  using T = Compute<Element>;
  constexpr int n = kWidth<T>;
  if (!maps.channels_last) {
    for (int64_t i = 0; i < n; ++i) {
      if (i >= count) {
        std::fill(rows + i * pixels, rows + (i + 1) * pixels, T(0));
        continue;
      }
      const Element* const row = image + (first + i) * maps.pixels + pixel;
      read_row(row, static_cast<int>(pixels), T(1), rows + i * pixels);
    }
    return transpose(rows, n, pixels, pixels, to, to_stride);
  }
  const Element* from = image + pixel * maps.channels + first;
  for (int64_t p = 0; p < pixels; ++p, from += maps.channels, to += to_stride) {
    if (count >= n) {
      store(to, load_elements(from));
      continue;
    }
    for (int64_t i = 0; i < n; ++i) to[i] = i < count ? to_compute(from[i]) : T(0);
  }
}

// image_out = from + bias + image_added for some pixels of `count` channels; in `from` a pixel's
// channels are neighbours.
template <class Element>
void write_channels(const Maps& maps, const Compute<Element>* from, int64_t from_stride,
                    const Compute<Element>* bias, const Element* image_added, int64_t first,
                    int64_t count, int64_t pixel, int64_t pixels, Compute<Element>* rows,
                    Element* image_out) {
  using T = Compute<Element>;
  constexpr int n = kWidth<T>;
  if (!maps.channels_last) {
    transpose(from, pixels, count, from_stride, rows, pixels);
    for (int64_t c = 0; c < count; ++c, rows += pixels) {
      const int64_t at = (first + c) * maps.pixels + pixel;
      int64_t p = 0;
      for (; p + n <= pixels; p += n) {
        const auto sum = load(rows + p) + bias[c] + load_elements(image_added + at + p);
        store_elements(image_out + at + p, sum);
      }
      for (; p < pixels; ++p) {
        from_compute(rows[p] + bias[c] + to_compute(image_added[at + p]), image_out[at + p]);
      }
    }
    return;
  }
  for (int64_t p = 0; p < pixels; ++p, from += from_stride) {
    const int64_t at = (pixel + p) * maps.channels + first;
    int64_t c = 0;
    for (; c + n <= count; c += n) {
      const auto sum = load(from + c) + load(bias + c) + load_elements(image_added + at + c);
      store_elements(image_out + at + c, sum);
    }
    for (; c < count; ++c) {
      from_compute(from[c] + bias[c] + to_compute(image_added[at + c]), image_out[at + c]);
    }
  }
}

// to[c] += sum over the rows.
template <class T>
void add_rows(const T* from, int64_t rows, int64_t columns, T* to) {
  for (int64_t c = 0; c < columns; c += kWidth<T>) {
    Vector<T> sum = {};
    for (int64_t r = 0; r < rows; ++r) sum += load(from + r * columns + c);
    store(to + c, load(to + c) + sum);
  }
}

// Gradients of one group's parameters, its channels filled up to whole vectors.
template <class T>
struct ParameterSums {
  int64_t size;
  T* all;
  T* mix;       // (padded, mixed)
  T* weights;   // (padded / n, kTaps, n)
  T* biases;    // (mixed)
  T* mix_bias;  // (padded)

  ParameterSums(int64_t padded, int64_t mixed, Pieces<T>& pieces)
      : size(padded * (mixed + kTaps + 1) + mixed),
        all(pieces.take(size)),
        mix(all),
        weights(mix + padded * mixed),
        biases(weights + padded * kTaps),
        mix_bias(biases + mixed) {}

  void clear() const { std::fill(all, all + size, T(0)); }
  void add(const ParameterSums& other) const { add_rows(other.all, 1, size, all); }
};

// One group's parameters, its channels filled up to whole vectors.
template <class T>
struct Group {
  static constexpr int n = kWidth<T>;
  const MultiGranularityShape& shape;
  int64_t channels;  // of a group
  int64_t padded;    // whole vectors of them
  int64_t mixed;     // channels that a group mixes, padded
  T* weights;        // (padded / n, kTaps, n)
  T* biases;         // (padded / n, kBranches, n)
  T* mix_bias;       // (padded)

  Group(const MultiGranularityShape& s, Pieces<T>& pieces)
      : shape(s),
        channels(s.group_channels()),
        padded(round_up(channels, n)),
        mixed(kBranches * padded),
        weights(pieces.take(padded * kTaps)),
        biases(pieces.take(mixed)),
        mix_bias(pieces.take(padded)) {}

  T* weights_of(int64_t vector) const { return weights + vector * kTaps * n; }
  T* biases_of(int64_t vector) const { return biases + vector * kBranches * n; }

  void load_parameters(int64_t group, const MultiGranularityWeights& from) const {
    std::fill(weights, weights + padded * kTaps, T(0));
    std::fill(biases, biases + mixed, T(0));
    std::fill(mix_bias, mix_bias + padded, T(0));
    const int64_t first = group * channels;
    for (int64_t v = 0; v * n < channels; ++v) {
      const int64_t count = std::min<int64_t>(n, channels - v * n), at = first + v * n;
      for (int b = 0; b < kBranches; ++b) {
        const int64_t taps = branch_side(b) * branch_side(b);
        const T* const kernel = static_cast<const T*>(from.weights[b]) + at * taps;
        transpose(kernel, count, taps, taps, weights_of(v) + branch_taps(b) * n, n);
        const T* const bias = static_cast<const T*>(from.biases[b]) + at;
        std::copy(bias, bias + count, biases_of(v) + b * n);
      }
    }
    const T* const bias = static_cast<const T*>(from.mix_bias) + first;
    std::copy(bias, bias + channels, mix_bias);
  }

  const T* mix_of(int64_t group, const MultiGranularityWeights& from) const {
    return static_cast<const T*>(from.mix_weight) + group * channels * kBranches * channels;
  }
};

template <class Element>
struct Forward {
  using T = Compute<Element>;
  static constexpr int n = kWidth<T>;
  const MultiGranularityShape& shape;
  Group<T> group;
  int64_t strip;  // rows of an image that are taken together
  T* mix;         // (mixed, padded): the mix's weight, transposed
  T* tile;
  T* pixels;    // of a vector's channels, as they go into the tile
  T* rows;      // of read_channels and write_channels
  T* branches;  // (pixels of a strip, mixed)
  T* result;    // (pixels of a strip, padded)

  Forward(const MultiGranularityShape& s, Pieces<T>& pieces)
      : shape(s),
        group(s, pieces),
        strip(std::min(s.height(), std::max(kStripRows, kStripPixels / s.width))),
        mix(pieces.take(group.mixed * group.padded)),
        tile(pieces.take(Tile<T>::size(strip, s.width))),
        pixels(pieces.take(tile_pixels() * n)),
        rows(pieces.take(std::max(tile_pixels() * n, strip_pixels() * group.padded))),
        branches(pieces.take(strip_pixels() * group.mixed)),
        result(pieces.take(strip_pixels() * group.padded)) {}

  int64_t strip_pixels() const { return strip * shape.width; }
  int64_t tile_pixels() const {
    return std::min(shape.height(), strip + 2 * kLargestMargin) * shape.width;
  }

  void start(int64_t which, const MultiGranularityWeights& weights) const {
    group.load_parameters(which, weights);
    std::fill(mix, mix + group.mixed * group.padded, T(0));
    const T* const from = group.mix_of(which, weights);
    for (int b = 0; b < kBranches; ++b) {
      transpose(from + b * group.channels, group.channels, group.channels,
                kBranches * group.channels, mix + b * group.padded * group.padded, group.padded);
    }
    std::fill(tile, tile + Tile<T>::size(strip, shape.width), T(0));
  }

  void run(int64_t which, const Element* x, Element* out) const {
    const int64_t height = shape.height(), width = shape.width, first = which * group.channels;
    for (int64_t top = 0; top < height; top += strip) {
      const int64_t bottom = std::min(height, top + strip);
      const int64_t above = std::max<int64_t>(0, top - kLargestMargin);
      const int64_t below = std::min(height, bottom + kLargestMargin);
      const Tile<T> map{tile, width};
      for (int64_t c = 0; c < group.channels; c += n) {
        read_channels(shape.maps, x, first + c, group.channels - c, above * width,
                      (below - above) * width, rows, pixels, n);
        map.fill(pixels, n, top - kLargestMargin, bottom + kLargestMargin, top, height);
        convolve(map, bottom - top, group.weights_of(c / n), group.biases_of(c / n), branches + c,
                 group.padded, group.mixed);
      }
      const int64_t count = (bottom - top) * width;
      matmul<T, false>(count, group.padded, group.mixed, {branches, group.mixed, 1}, mix,
                       group.padded, kPanel<T>, result, group.padded);
      write_channels(shape.maps, result, group.padded, group.mix_bias, x, first, group.channels,
                     top * width, count, rows, out);
    }
  }
};

template <class Element>
struct Backward {
  using T = Compute<Element>;
  static constexpr int n = kWidth<T>;
  const MultiGranularityShape& shape;
  Group<T> group;
  int64_t tile_size;
  T* mix;  // (padded, mixed): the mix's weight
  // Long sums lose precision: some pixels', then an image's, then those of the images.
  ParameterSums<T> image, total;
  T* tiles;   // of x, one for each vector of channels
  T* tile;    // of a branch's gradient
  T* pixels;  // of a vector's channels
  T* rows;
  T* grads;     // (pixels, padded)
  T* branches;  // (pixels, mixed): their results and then their gradients

  Backward(const MultiGranularityShape& s, Pieces<T>& pieces)
      : shape(s),
        group(s, pieces),
        tile_size(Tile<T>::size(s.height(), s.width)),
        mix(pieces.take(group.padded * group.mixed)),
        image(group.padded, group.mixed, pieces),
        total(group.padded, group.mixed, pieces),
        tiles(pieces.take(group.padded / n * tile_size)),
        tile(pieces.take(tile_size)),
        pixels(pieces.take(s.maps.pixels * n)),
        rows(pieces.take(s.maps.pixels * n)),
        grads(pieces.take(s.maps.pixels * group.padded)),
        branches(pieces.take(s.maps.pixels * group.mixed)) {}

  Tile<T> tile_of(int64_t vector) const { return {tiles + vector * tile_size, shape.width}; }

  void start(int64_t which, const MultiGranularityWeights& weights) const {
    group.load_parameters(which, weights);
    std::fill(mix, mix + group.padded * group.mixed, T(0));
    const T* from = group.mix_of(which, weights);
    for (int64_t o = 0; o < group.channels; ++o) {
      for (int b = 0; b < kBranches; ++b, from += group.channels) {
        std::copy(from, from + group.channels, mix + o * group.mixed + b * group.padded);
      }
    }
    std::fill(tiles, tiles + group.padded / n * tile_size, T(0));
    std::fill(tile, tile + tile_size, T(0));
    total.clear();
  }

  void run(int64_t which, const Element* grad_out, const Element* x, Element* grad_x) const {
    const int64_t count = shape.maps.pixels, height = shape.height();
    const int64_t first = which * group.channels, mixed = group.mixed, padded = group.padded;
    image.clear();
    for (int64_t c = 0; c < group.channels; c += n) {
      const int64_t left = group.channels - c;
      read_channels(shape.maps, grad_out, first + c, left, 0, count, rows, grads + c, padded);
      read_channels(shape.maps, x, first + c, left, 0, count, rows, pixels, n);
      const Tile<T> map = tile_of(c / n);
      map.fill(pixels, n, 0, height, 0, height);
      convolve(map, height, group.weights_of(c / n), group.biases_of(c / n), branches + c, padded,
               mixed);
    }
    for (int64_t p = 0; p < count; p += kSumPixels) {
      const int64_t some = std::min(kSumPixels, count - p);
      const T* const grad = grads + p * padded;
      T* const branch = branches + p * mixed;
      add_rows(grad, some, padded, image.mix_bias);
      matmul<T, true>(padded, mixed, some, {grad, 1, padded}, branch, mixed, kPanel<T>, image.mix,
                      mixed);
      matmul<T, false>(some, mixed, padded, {grad, padded, 1}, mix, mixed, kPanel<T>, branch,
                       mixed);
      add_rows(branch, some, mixed, image.biases);
    }
    for (int64_t c = 0; c < group.channels; c += n) {
      through<0>(c);
      through<1>(c);
      through<2>(c);
      const T zeros[n] = {};
      write_channels(shape.maps, pixels, n, zeros, grad_out, first + c,
                     std::min<int64_t>(n, group.channels - c), 0, count, rows, grad_x);
    }
    total.add(image);
  }

  // Through one branch of the vector of channels from c on.
  template <int kBranch>
  void through(int64_t c) const {
    const int64_t height = shape.height();
    const Tile<T> map{tile, shape.width};
    map.fill(branches + kBranch * group.padded + c, group.mixed, 0, height, 0, height);
    correlate<T, kBranch>(tile_of(c / n), map, height, kSumPixels, image.weights + c * kTaps);
    turn_back<T, kBranch, (kBranch > 0)>(map, height, group.weights_of(c / n), pixels);
  }

  void finish(int64_t which, const MultiGranularityGradients& to) const {
    const int64_t first = which * group.channels;
    for (int b = 0; b < kBranches; ++b) {
      const int64_t taps = branch_side(b) * branch_side(b);
      for (int64_t c = 0; c < group.channels; ++c) {
        const T* const from = total.weights + c / n * n * kTaps + branch_taps(b) * n + c % n;
        T* const kernel = static_cast<T*>(to.weights[b]) + (first + c) * taps;
        for (int64_t t = 0; t < taps; ++t) kernel[t] = from[t * n];
      }
      const T* const bias = total.biases + b * group.padded;
      std::copy(bias, bias + group.channels, static_cast<T*>(to.biases[b]) + first);
    }
    T* mix_to = static_cast<T*>(to.mix_weight) + first * kBranches * group.channels;
    for (int64_t o = 0; o < group.channels; ++o) {
      for (int b = 0; b < kBranches; ++b, mix_to += group.channels) {
        const T* const from = total.mix + o * group.mixed + b * group.padded;
        std::copy(from, from + group.channels, mix_to);
      }
    }
    std::copy(total.mix_bias, total.mix_bias + group.channels,
              static_cast<T*>(to.mix_bias) + first);
  }
};

// run(work) with scratch of its own, of which Work is made, for each of `tasks`.
template <class Work, class T, class Run>
bool for_each_task(const MultiGranularityShape& shape, int64_t tasks, int threads, const Run& run) {
  Pieces<T> measured{nullptr};
  Work(shape, measured);
  std::atomic<bool> ran = true;
  parallel_for(tasks, threads, [&](int64_t task) {
    T* const memory = static_cast<T*>(thread_scratch(measured.size * sizeof(T)));
    if (!memory) {
      ran = false;
      return;
    }
    Pieces<T> pieces{memory};
    run(task, Work(shape, pieces));
  });
  return ran;
}

}  // namespace

bool multi_granularity_forward(const void* x, const MultiGranularityWeights& weights, void* out,
                               const MultiGranularityShape& shape, DType dtype, int threads) {
  bool ran = false;
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    using T = Compute<Element>;
    // Each group's parameters are arranged once, or as often as it takes to occupy the threads.
    const int64_t batch = shape.maps.batch;
    const int64_t wanted = threads > 1 ? (4 * threads + shape.groups - 1) / shape.groups : 1;
    const int64_t parts = std::min(batch, wanted);
    ran = for_each_task<Forward<Element>, T>(
        shape, shape.groups * parts, threads, [&](int64_t task, const Forward<Element>& work) {
          const int64_t which = task / parts, part = task % parts;
          work.start(which, weights);
          for (int64_t i = part * batch / parts; i < (part + 1) * batch / parts; ++i) {
            const int64_t at = i * shape.maps.image();
            work.run(which, static_cast<const Element*>(x) + at, static_cast<Element*>(out) + at);
          }
        });
  });
  return ran;
}

bool multi_granularity_backward(const void* grad_out, const void* x,
                                const MultiGranularityWeights& weights,
                                const MultiGranularityGradients& gradients,
                                const MultiGranularityShape& shape, DType dtype, int threads) {
  bool ran = false;
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    using T = Compute<Element>;
    // One task a group: its parameters' gradients are sums over the batch in one order.
    ran = for_each_task<Backward<Element>, T>(
        shape, shape.groups, threads, [&](int64_t which, const Backward<Element>& work) {
          work.start(which, weights);
          for (int64_t i = 0; i < shape.maps.batch; ++i) {
            const int64_t at = i * shape.maps.image();
            work.run(which, static_cast<const Element*>(grad_out) + at,
                     static_cast<const Element*>(x) + at, static_cast<Element*>(gradients.x) + at);
          }
          work.finish(which, gradients);
        });
  });
  return ran;
}

}  // namespace kernelpose::cpu::KP_ISA
