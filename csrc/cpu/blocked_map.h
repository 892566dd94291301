// Maps in blocks of channels, a vector's or fewer, with margins of zeros at the sides; and the way
// from and to how tensors lie.
#pragma once

#include <algorithm>

#include "simd.h"
#include "transpose.h"

namespace kernelpose::cpu::KP_ISA {

// Channels of a pixel that lie together in a map of few channels.
constexpr int kFewChannels = 4;

// A map whose columns lie by their remainder modulo `stride`, so that what neighbouring pixels of a
// convolution with that stride read are neighbours.
template <class T>
struct BlockedMap {
  T* data;
  int64_t channels, height, width;
  int64_t margin;  // columns of zeros at either side
  int64_t stride;
  int64_t lanes;  // channels of a block: kWidth or kFewChannels

  static int64_t lanes_for(int64_t channels) {
    return channels <= kFewChannels ? kFewChannels : kWidth<T>;
  }
  int64_t blocks() const { return (channels + lanes - 1) / lanes; }
  int64_t columns() const { return (width + 2 * margin + stride - 1) / stride; }  // of a remainder
  int64_t row() const { return stride * columns() * lanes; }
  int64_t block() const { return height * row(); }
  int64_t size() const { return blocks() * block(); }
  // Column `column` may be as little as -margin.
  T* at(int64_t which_block, int64_t h, int64_t column) const {
    int64_t c = column + margin;
    if (stride > 1) c = c % stride * columns() + c / stride;
    return data + which_block * block() + h * row() + c * lanes;
  }

  // Makes the margins of some rows of a block zeros.
  void clear_margins(int64_t which_block, int64_t first, int64_t end) const {
    for (int64_t h = first; h < end; ++h) {
      for (int64_t c = 0; c < margin; ++c) {
        for (T* const to : {at(which_block, h, -1 - c), at(which_block, h, width + c)}) {
          std::fill(to, to + lanes, T(0));
        }
      }
    }
  }
};

// How an image of a tensor lies.
struct ImageLayout {
  int64_t channels, height, width;
  bool channels_last;

  int64_t size() const { return channels * height * width; }
};

// The map that an image becomes for a convolution of a stride: of few channels, or blocks of them.
template <class T>
BlockedMap<T> input_map(T* place, const ImageLayout& layout, int64_t margin, int64_t stride) {
  const int64_t lanes = BlockedMap<T>::lanes_for(layout.channels);
  return {place, layout.channels, layout.height, layout.width, margin, stride, lanes};
}

// Row h of `count` channels from `first` on, one pixel after the other, `lanes` apart. planes:
// scratch for count * width numbers.
template <class Element>
void read_pixels(const Element* image, const ImageLayout& layout, int64_t first, int64_t count,
                 int64_t h, Compute<Element>* to, int64_t lanes, Compute<Element>* planes) {
  using T = Compute<Element>;
  const int64_t width = layout.width;
  if (layout.channels_last) {
    const Element* from = image + h * width * layout.channels + first;
    for (int64_t w = 0; w < width; ++w, from += layout.channels, to += lanes) {
      if (count == kWidth<T>) {
        store(to, load_elements(from));
        continue;
      }
      for (int64_t c = 0; c < count; ++c) to[c] = to_compute(from[c]);
    }
    return;
  }
  const Element* const from = image + (first * layout.height + h) * width;
  const int64_t plane = layout.height * width;
  if constexpr (std::is_same_v<Element, T>) {
    transpose(from, count, width, plane, to, lanes);
  } else {
    for (int64_t c = 0; c < count; ++c) {
      read_row(from + c * plane, static_cast<int>(width), T(1), planes + c * width);
    }
    transpose(planes, count, width, width, to, lanes);
  }
}

// The inverse, from pixels of kWidth channels.
template <class Element>
void write_pixels(const Compute<Element>* from, const ImageLayout& layout, int64_t first,
                  int64_t count, int64_t h, Compute<Element>* planes, Element* image) {
  using T = Compute<Element>;
  constexpr int n = kWidth<T>;
  const int64_t width = layout.width;
  if (layout.channels_last) {
    Element* to = image + h * width * layout.channels + first;
    for (int64_t w = 0; w < width; ++w, from += n, to += layout.channels) {
      if (count == n) {
        store_elements(to, load(from));
        continue;
      }
      for (int64_t c = 0; c < count; ++c) from_compute(from[c], to[c]);
    }
    return;
  }
  Element* const to = image + (first * layout.height + h) * width;
  const int64_t plane = layout.height * width;
  if constexpr (std::is_same_v<Element, T>) {
    transpose(from, width, count, n, to, plane);
  } else {
    transpose(from, width, count, n, planes, width);
    for (int64_t c = 0; c < count; ++c) {
      write_row(planes + c * width, static_cast<int>(width), T(1), to + c * plane);
    }
  }
}

// Numbers of scratch for a row of pixels, or of planes.
template <class T>
int64_t row_scratch(int64_t width) {
  return round_up(width, kWidth<T>) * std::max(kWidth<T>, kFewChannels);
}

// Rows [first, end) of all channels of an image, from `channel` on. row: scratch for two rows.
template <class Element>
void read_map(const Element* image, const ImageLayout& layout, int64_t channel,
              const BlockedMap<Compute<Element>>& to, Compute<Element>* row, int64_t first,
              int64_t end) {
  using T = Compute<Element>;
  T* const pixels = row + row_scratch<T>(layout.width);
  for (int64_t b = 0; b < to.blocks(); ++b) {
    to.clear_margins(b, first, end);
    const int64_t count = std::min(to.lanes, to.channels - b * to.lanes);
    const int64_t from = channel + b * to.lanes;
    for (int64_t h = first; h < end; ++h) {
      if (to.stride == 1) {
        read_pixels(image, layout, from, count, h, to.at(b, h, 0), to.lanes, row);
        continue;
      }
      read_pixels(image, layout, from, count, h, pixels, to.lanes, row);
      for (int64_t start = 0; start < std::min(to.stride, to.width); ++start) {
        T* pixel = to.at(b, h, start);
        for (int64_t w = start; w < to.width; w += to.stride, pixel += to.lanes) {
          std::copy(pixels + w * to.lanes, pixels + w * to.lanes + count, pixel);
        }
      }
    }
  }
}

}  // namespace kernelpose::cpu::KP_ISA
