// A chain of dilated 3x3 convolutions on the CPU. An image's maps lie in blocks of channels, two at
// a time, in the second level of the cache; each row leaves for the result while it is in the
// first.
#include "dilated_pyramid.h"

#include <algorithm>

#include "channel_passes.h"
#include "dilated_pyramid_convolution.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

constexpr int64_t kBandRows = 4;  // at least, of an image that several threads share

template <class Element>
class Chain {
 public:
  using T = Compute<Element>;
  static constexpr int n = kWidth<T>;

  Chain(const DilatedPyramidShape& shape, const DilatedPyramidLayers& layers)
      : shape_(shape), layers_(layers), height_(shape.out_height()), width_(shape.out_width()) {
    for (size_t i = 1; i <= layers.size(); ++i) {
      packed_size_ += convolution(i).packed_size();
      scratch_size_ = std::max(scratch_size_, convolution(i).scratch_size());
    }
    for (size_t i = 0; i <= layers.size(); ++i) {
      map_size_[i % 2] = std::max(map_size_[i % 2], size_to_read(map(i)));
    }
    sum_size_ = shape.sum ? round_up(layers[0].channels, n) * height_ * width_ : 0;
  }

  int64_t packed_size() const { return packed_size_; }
  int64_t image_size() const { return map_size_[0] + map_size_[1] + sum_size_; }
  // Of each thread.
  int64_t row_size() const {
    return scratch_size_ + 2 * row_scratch<T>(std::max(width_, shape_.width));
  }
  // Rows of f_i in multiples of which an image may be divided.
  int64_t rows_multiple(size_t i) const { return convolution(i).rows_multiple(); }

  ImageLayout in() const {
    return {shape_.channels, shape_.height, shape_.width, shape_.channels_last};
  }
  ImageLayout all() const {
    return {pyramid_channels(layers_), height_, width_, shape_.channels_last};
  }
  ImageLayout out() const {
    ImageLayout layout = all();
    if (shape_.sum) layout.channels = layers_[0].channels;
    return layout;
  }

  void pack(T* to) const {
    for (size_t i = 1; i <= layers_.size(); ++i) {
      convolution(i).pack(static_cast<const T*>(layers_[i - 1].weight),
                          static_cast<const T*>(layers_[i - 1].bias), false, to);
      to += convolution(i).packed_size();
    }
  }

  // f_0 in rows [first, end).
  void read(const Element* x, T* memory, T* row, int64_t first, int64_t end) const {
    read_map(x, in(), 0, map(0, memory), row, first, end);
  }

  // f_i in rows [first, end) of one image, given f_{i-1}.
  void layer(size_t i, const T* packed, T* memory, T* row, Element* result, Element* maps,
             int64_t first, int64_t end) const {
    int64_t before = 0;  // channels
    for (size_t j = 1; j < i; ++j) {
      packed += convolution(j).packed_size();
      before += layers_[j - 1].channels;
    }
    const BlockedMap<T> to = map(i, memory);
    T* const sums = memory + map_size_[0] + map_size_[1];
    convolution(i).run(map(i - 1, memory), packed, shape_.relu, to, first, end,
                       row + row_size() - scratch_size_, [&](int64_t b, int64_t h) {
                         const T* const from = to.at(b, h, 0);
                         const int64_t count = std::min<int64_t>(n, to.channels - b * n);
                         if (!shape_.sum)
                           return write_pixels(from, out(), before + b * n, count, h, row, result);
                         if (maps) write_pixels(from, all(), before + b * n, count, h, row, maps);
                         T* const sum = sums + (b * height_ + h) * width_ * n;
                         for (int64_t w = 0; w < width_ * n; w += n) {
                           store(sum + w, i == 1 ? load(from + w) : load(sum + w) + load(from + w));
                         }
                         if (i == layers_.size())
                           write_pixels(sum, out(), b * n, count, h, row, result);
                       });
  }

 private:
  Convolution<T> convolution(size_t i) const {
    return {map(i - 1), layers_[i - 1].channels, layers_[i - 1].dilation, height_, width_};
  }

  // f_i, x for i = 0: the even ones in one place, the odd ones in another. Only x may have few
  // channels a block.
  BlockedMap<T> map(size_t i, T* memory = nullptr) const {
    T* const place = memory ? memory + (i % 2 ? map_size_[0] : 0) : nullptr;
    const int64_t margin = i < layers_.size() ? layers_[i].dilation : 0;
    if (i == 0) return input_map(place, in(), margin, shape_.stride);
    return {place, layers_[i - 1].channels, height_, width_, margin, 1, n};
  }

  const DilatedPyramidShape& shape_;
  const DilatedPyramidLayers& layers_;
  int64_t height_, width_;
  int64_t packed_size_ = 0, scratch_size_ = 0, map_size_[2] = {}, sum_size_;
};

template <class Element>
bool forward(const Element* x, const DilatedPyramidLayers& layers, Element* out, Element* maps,
             const DilatedPyramidShape& shape, int threads) {
  using T = Compute<Element>;
  const Chain<Element> chain(shape, layers);
  const int64_t in_image = chain.in().size(), out_image = chain.out().size();
  // Images are divided among the threads; where there are fewer, the threads divide each.
  const bool share = shape.batch < threads;
  const int64_t parts = share ? 1 : std::max<int64_t>(1, std::min<int64_t>(threads, shape.batch));
  // Bands of an image that the threads share.
  const int64_t most = 2 * static_cast<int64_t>(threads);
  const int64_t rows = chain.row_size(), row_count = share ? most : parts;
  const int64_t size = chain.packed_size() + parts * chain.image_size() + row_count * rows;
  T* const packed = static_cast<T*>(thread_scratch(static_cast<size_t>(size) * sizeof(T)));
  if (!packed) return false;
  T* const images = packed + chain.packed_size();
  T* const row_memory = images + parts * chain.image_size();
  chain.pack(packed);
  const auto layer = [&](size_t i, int64_t image, T* memory, T* row, int64_t first, int64_t end) {
    chain.layer(i, packed, memory, row, out + image * out_image,
                maps ? maps + image * chain.all().size() : nullptr, first, end);
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
  const auto in_bands = [&](int64_t height, int64_t multiple, const auto& run) {
    const int64_t band = round_up(std::max(kBandRows, (height + most - 1) / most), multiple);
    parallel_for((height + band - 1) / band, threads, [&](int64_t which) {
      run(row_memory + which * rows, which * band, std::min(height, (which + 1) * band));
    });
  };
  for (int64_t image = 0; image < shape.batch; ++image) {
    in_bands(shape.height, 1, [&](T* row, int64_t first, int64_t end) {
      chain.read(x + image * in_image, images, row, first, end);
    });
    for (size_t i = 1; i <= layers.size(); ++i) {
      in_bands(shape.out_height(), chain.rows_multiple(i), [&](T* row, int64_t first, int64_t end) {
        layer(i, image, images, row, first, end);
      });
    }
  }
  return true;
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

}  // namespace kernelpose::cpu::KP_ISA
