// A chain of dilated 3x3 convolutions on the CPU. An image's maps lie in blocks of channels, two at
// a time, in the second level of the cache; each row leaves for the result while it is in the
// first.
#include "dilated_pyramid.h"

#include <algorithm>

#include "channel_passes.h"
#include "dilated_pyramid_convolution.h"
#include "transpose.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

constexpr int64_t kBandRows = 4;  // of an image that several threads share

template <class Element>
class Chain {
 public:
  using T = Compute<Element>;
  static constexpr int n = kWidth<T>;

  Chain(const DilatedPyramidShape& shape, const DilatedPyramidLayers& layers)
      : shape_(shape),
        layers_(layers),
        height_(shape.out_height()),
        width_(shape.out_width()),
        all_channels_(pyramid_channels(layers)) {
    for (size_t i = 0; i < layers.size(); ++i) packed_size_ += packed(i);
    for (int which = 0; which < 2; ++which) {
      for (size_t i = 0; i <= layers.size(); ++i) {
        if (i % 2 == size_t(which)) map_size_[which] = std::max(map_size_[which], map(i).size());
      }
      // What is computed of pixels beyond the last one reads on behind it.
      map_size_[which] = round_up(map_size_[which] + kBehind, n);
    }
    sum_size_ = shape.sum ? round_up(layers[0].channels, n) * height_ * width_ : 0;
    row_size_ = round_up(std::max(width_, shape.width), n) * std::max(n, kFewChannels);
  }

  int64_t packed_size() const { return packed_size_; }
  int64_t image_size() const { return map_size_[0] + map_size_[1] + sum_size_; }
  int64_t row_size() const { return row_size_; }  // of each thread

  void pack(T* to) const {
    for (size_t i = 0; i < layers_.size(); ++i) {
      pack_layer(i, to);
      to += packed(i);
    }
  }

  // f_0 in rows [first, end).
  void read(const Element* x, T* memory, T* row, int64_t first, int64_t end) const {
    const BlockedMap<T> to = map(0, memory);
    for (int64_t b = 0; b < to.blocks(); ++b) {
      to.clear_margins(b, first, end);
      const int64_t channel = b * to.lanes;
      const int64_t count = std::min(to.lanes, shape_.channels - channel);
      for (int64_t h = first; h < end; ++h) {
        if (to.stride == 1) {
          read_row(x, channel, count, h, to.at(b, h, 0), to.lanes, row);
          continue;
        }
        T* const pixels = row + row_size_;
        read_row(x, channel, count, h, pixels, to.lanes, row);
        for (int64_t start = 0; start < std::min(to.stride, shape_.width); ++start) {
          T* pixel = to.at(b, h, start);
          for (int64_t w = start; w < shape_.width; w += to.stride, pixel += to.lanes) {
            std::copy(pixels + w * to.lanes, pixels + w * to.lanes + count, pixel);
          }
        }
      }
    }
  }

  // f_i in rows [first, end) of one image, given f_{i-1}.
  void layer(size_t i, const T* packed_weights, T* memory, T* row, Element* out, Element* maps,
             int64_t first, int64_t end) const {
    const BlockedMap<T> from = map(i - 1, memory), to = map(i, memory);
    const DilatedPyramidLayer& layer = layers_[i - 1];
    const T* weights = packed_weights;
    for (size_t j = 0; j + 1 < i; ++j) weights += packed(j);
    const int64_t vectors = to.blocks();
    for (int64_t v = 0; v < vectors;) {
      const int width = group(i - 1, vectors - v);
      const PackedWeights<T> group{weights + width * n, weights};
      for (int64_t b = v; b < v + width; ++b) to.clear_margins(b, first, end);
      for (int64_t h = first; h < end; ++h) {
        const auto run = [&](auto many, auto lanes) {
          convolve_row<T, decltype(many)::value, decltype(lanes)::value>(
              from, layer.dilation, h, width_, group, shape_.relu, to.at(v, h, 0), to.block());
        };
        using One = std::integral_constant<int, 1>;
        if (from.lanes != n) {
          run(One{}, std::integral_constant<int, kFewChannels>{});
        } else if (width == 1) {
          run(One{}, std::integral_constant<int, n>{});
        } else {
          run(std::integral_constant<int, kPyramidVectors>{}, std::integral_constant<int, n>{});
        }
        for (int64_t b = v; b < v + width; ++b) write(i, to, b, h, memory, row, out, maps);
      }
      v += width;
      weights += group_size(i - 1, width);
    }
  }

 private:
  static constexpr int64_t kBehind = kPixelSteps * pixel_step(1) * n;

  int64_t channels_before(size_t layer) const {
    return layer ? layers_[layer - 1].channels : shape_.channels;
  }

  // Vectors of output channels that are computed together, out of `left`.
  int group(size_t layer, int64_t left) const {
    const bool few = layer == 0 && shape_.channels <= kFewChannels;
    return few || left < kPyramidVectors ? 1 : kPyramidVectors;
  }
  // Their bias and their weights.
  int64_t group_size(size_t layer, int vectors) const {
    return (1 + kPyramidTaps * channels_before(layer)) * vectors * n;
  }
  int64_t packed(size_t layer) const {
    const int64_t vectors = (layers_[layer].channels + n - 1) / n;
    return (1 + kPyramidTaps * channels_before(layer)) * vectors * n;
  }

  // f_i, x for i = 0: the even ones in one place, the odd ones in another. Only x may have few
  // channels a block.
  BlockedMap<T> map(size_t i, T* memory = nullptr) const {
    T* const place = memory ? memory + (i % 2 ? map_size_[0] : 0) : nullptr;
    const int64_t margin = i < layers_.size() ? layers_[i].dilation : 0;
    if (i == 0) {
      return {place,
              shape_.channels,
              shape_.height,
              shape_.width,
              margin,
              shape_.stride,
              BlockedMap<T>::lanes_for(shape_.channels)};
    }
    return {place, layers_[i - 1].channels, height_, width_, margin, 1, n};
  }

  void pack_layer(size_t i, T* to) const {
    const int64_t inputs = channels_before(i), outputs = layers_[i].channels;
    const int64_t lanes = map(i).lanes;
    const T* const weight = static_cast<const T*>(layers_[i].weight);
    const T* const bias = static_cast<const T*>(layers_[i].bias);
    for (int64_t v = 0; v * n < outputs;) {
      const int vectors = group(i, (outputs + n - 1) / n - v);
      const int64_t first = v * n, row = vectors * n, real = std::min(row, outputs - first);
      std::fill(to, to + row, T(0));
      std::copy(bias + first, bias + first + real, to);
      to += row;
      for (int64_t b = 0; b < inputs; b += lanes) {
        const int64_t count = std::min(lanes, inputs - b);
        alignas(kVectorBytes)
            T table[kPyramidTaps * std::max(n, kFewChannels) * kPyramidVectors * n] = {};
        transpose(weight + (first * inputs + b) * kPyramidTaps, real, count * kPyramidTaps,
                  inputs * kPyramidTaps, table, row);
        for (int64_t tap = 0; tap < kPyramidTaps; ++tap) {
          for (int64_t c = 0; c < count; ++c, to += row) {
            const T* const from = table + (c * kPyramidTaps + tap) * row;
            std::copy(from, from + row, to);
          }
        }
      }
      v += vectors;
    }
  }

  // Row h of x, `count` channels from `channel` on of one pixel after the other, `lanes` apart.
  void read_row(const Element* x, int64_t channel, int64_t count, int64_t h, T* to, int64_t lanes,
                T* planes) const {
    const int64_t width = shape_.width;
    if (shape_.channels_last) {
      const Element* from = x + h * width * shape_.channels + channel;
      for (int64_t w = 0; w < width; ++w, from += shape_.channels, to += lanes) {
        if (count == n) {
          store(to, load_elements(from));
          continue;
        }
        for (int64_t c = 0; c < count; ++c) to[c] = to_compute(from[c]);
      }
      return;
    }
    const Element* from = x + (channel * shape_.height + h) * width;
    const int64_t plane = shape_.height * width;
    if constexpr (std::is_same_v<Element, T>) {
      transpose(from, count, width, plane, to, lanes);
    } else {
      for (int64_t c = 0; c < count; ++c) {
        cpu::KP_ISA::read_row(from + c * plane, static_cast<int>(width), T(1), planes + c * width);
      }
      transpose(planes, count, width, width, to, lanes);
    }
  }

  // Row h of block b of f_i to where it belongs in the result.
  void write(size_t i, const BlockedMap<T>& map, int64_t b, int64_t h, T* memory, T* row,
             Element* out, Element* maps) const {
    const T* const from = map.at(b, h, 0);
    const int64_t count = std::min<int64_t>(n, map.channels - b * n);
    int64_t first = b * n;
    for (size_t j = 0; j + 1 < i; ++j) first += layers_[j].channels;
    if (!shape_.sum) return write_row(from, first, count, h, all_channels_, row, out);
    if (maps) write_row(from, first, count, h, all_channels_, row, maps);
    T* const sum = memory + map_size_[0] + map_size_[1] + (b * height_ + h) * width_ * n;
    for (int64_t w = 0; w < width_; ++w) {
      const Vector<T> value = load(from + w * n);
      store(sum + w * n, i == 1 ? value : load(sum + w * n) + value);
    }
    if (i == layers_.size()) write_row(sum, b * n, count, h, map.channels, row, out);
  }

  // A row of `count` channels from `first` on of maps that have `channels`.
  void write_row(const T* from, int64_t first, int64_t count, int64_t h, int64_t channels, T* row,
                 Element* to) const {
    if (shape_.channels_last) {
      to += h * width_ * channels + first;
      for (int64_t w = 0; w < width_; ++w, from += n, to += channels) {
        if (count == n) {
          store_elements(to, load(from));
          continue;
        }
        for (int64_t c = 0; c < count; ++c) from_compute(from[c], to[c]);
      }
      return;
    }
    to += (first * height_ + h) * width_;
    const int64_t plane = height_ * width_;
    if constexpr (std::is_same_v<Element, T>) {
      transpose(from, width_, count, n, to, plane);
    } else {
      transpose(from, width_, count, n, row, width_);
      for (int64_t c = 0; c < count; ++c) {
        cpu::KP_ISA::write_row(row + c * width_, static_cast<int>(width_), T(1), to + c * plane);
      }
    }
  }

  const DilatedPyramidShape& shape_;
  const DilatedPyramidLayers& layers_;
  int64_t height_, width_, all_channels_;
  int64_t packed_size_ = 0, map_size_[2] = {}, sum_size_, row_size_;
};

template <class Element>
bool forward(const Element* x, const DilatedPyramidLayers& layers, Element* out, Element* maps,
             const DilatedPyramidShape& shape, int threads) {
  using T = Compute<Element>;
  const Chain<Element> chain(shape, layers);
  const int64_t all = pyramid_channels(layers), pixels = shape.out_pixels();
  const int64_t in_image = shape.channels * shape.height * shape.width;
  const int64_t out_image = (shape.sum ? layers[0].channels : all) * pixels;
  // Images are divided among the threads; where there are fewer, the threads divide each.
  const bool share = shape.batch < threads;
  const int64_t parts = share ? 1 : std::max<int64_t>(1, std::min<int64_t>(threads, shape.batch));
  const int64_t rows = 2 * chain.row_size();
  const int64_t bands_of_x = (shape.height + kBandRows - 1) / kBandRows;
  const int64_t bands = (shape.out_height() + kBandRows - 1) / kBandRows;
  const int64_t row_count = share ? std::max(bands, bands_of_x) : parts;
  const int64_t size = chain.packed_size() + parts * chain.image_size() + row_count * rows;
  T* const packed = static_cast<T*>(thread_scratch(static_cast<size_t>(size) * sizeof(T)));
  if (!packed) return false;
  T* const images = packed + chain.packed_size();
  T* const row_memory = images + parts * chain.image_size();
  chain.pack(packed);
  const auto layer = [&](size_t i, int64_t image, T* memory, T* row, int64_t first, int64_t end) {
    chain.layer(i, packed, memory, row, out + image * out_image,
                maps ? maps + image * all * pixels : nullptr, first, end);
  };
  if (!share) {
    parallel_for(parts, threads, [&](int64_t part) {
      T* const memory = images + part * chain.image_size();
      T* const row = row_memory + part * rows;
      for (int64_t image = part * shape.batch / parts; image < (part + 1) * shape.batch / parts;
           ++image) {
        chain.read(x + image * in_image, memory, row, 0, shape.height);
        for (size_t i = 1; i <= layers.size(); ++i) {
          layer(i, image, memory, row, 0, shape.out_height());
        }
      }
    });
    return true;
  }
  for (int64_t image = 0; image < shape.batch; ++image) {
    parallel_for(bands_of_x, threads, [&](int64_t band) {
      chain.read(x + image * in_image, images, row_memory + band * rows, band * kBandRows,
                 std::min(shape.height, (band + 1) * kBandRows));
    });
    for (size_t i = 1; i <= layers.size(); ++i) {
      parallel_for(bands, threads, [&](int64_t band) {
        layer(i, image, images, row_memory + band * rows, band * kBandRows,
              std::min(shape.out_height(), (band + 1) * kBandRows));
      });
    }
  }
  return true;
}

template <class Element>
void mask(const Element* grad_out, const Element* carry, const Element* map, Element* grad,
          const PyramidRows& table, int threads) {
  using T = Compute<Element>;
  constexpr int n = kWidth<T>;
  // A task is part of a long row or a number of short ones.
  const int64_t part = std::min(table.columns, kTaskElements);
  const int64_t parts = (table.columns + part - 1) / part;
  const int64_t rows = std::max<int64_t>(1, kTaskElements / table.columns);
  const int64_t blocks = (table.rows + rows - 1) / rows;
  parallel_for(blocks * parts, threads, [&](int64_t task) {
    const int64_t first = task % parts * part, end = std::min(table.columns, first + part);
    const int64_t top = task / parts * rows, bottom = std::min(table.rows, top + rows);
    for (int64_t r = top; r < bottom; ++r) {
      const Element* const from = grad_out + r * table.grad_out_row;
      const Element* const gate = map ? map + r * table.map_row : nullptr;
      const int64_t at = r * table.columns;
      int64_t c = first;
      for (; c + n <= end; c += n) {
        Vector<T> sum = load_elements(from + c);
        if (carry) sum += load_elements(carry + at + c);
        if (gate) sum = load_elements(gate + c) <= Vector<T>{} ? Vector<T>{} : sum;
        store_elements(grad + at + c, sum);
      }
      for (; c < end; ++c) {
        T sum = to_compute(from[c]);
        if (carry) sum += to_compute(carry[at + c]);
        if (gate && to_compute(gate[c]) <= 0) sum = 0;
        from_compute(sum, grad[at + c]);
      }
    }
  });
}

}  // namespace

bool dilated_pyramid_forward(const void* x, const DilatedPyramidLayers& layers, void* out,
                             void* maps, const DilatedPyramidShape& shape, DType dtype,
                             int threads) {
  bool ran = false;
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    ran = forward(static_cast<const Element*>(x), layers, static_cast<Element*>(out),
                  static_cast<Element*>(maps), shape, threads);
  });
  return ran;
}

void dilated_pyramid_mask(const void* grad_out, const void* carry, const void* map, void* grad,
                          const PyramidRows& rows, DType dtype, int threads) {
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    mask(static_cast<const Element*>(grad_out), static_cast<const Element*>(carry),
         static_cast<const Element*>(map), static_cast<Element*>(grad), rows, threads);
  });
}

}  // namespace kernelpose::cpu::KP_ISA
