// The gradients of a chain of dilated 3x3 convolutions on the CPU, an image after the other: from
// the last layer to the first, with the maps of two layers and their gradients in the cache. The
// gradients of the parameters are sums over a fixed number of parts of the batch, whatever the
// threads.
#include <algorithm>
#include <vector>

#include "channel_passes.h"
#include "dilated_pyramid.h"
#include "dilated_pyramid_convolution.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

constexpr int64_t kParts = 8;              // at most
constexpr int64_t kPartNumbers = 4 << 20;  // of the parameters' gradients, all parts together
constexpr int64_t kBandPixels = 256;       // whose maps and gradients stay in the first level

// Adds to kInputs channels' gradients of one tap, a vector of outputs or several: over the rows
// [first, end) the sum of input times gradient. It is added up by itself: one chain of sums over a
// whole map would lose several times as much to rounding.
template <class T, int kInputs, int kVectors>
void correlate(const BlockedMap<T>& in, int64_t block, int64_t channel, const BlockedMap<T>& grad,
               int64_t vector, int64_t dy, int64_t dx, int64_t first, int64_t end, T* sums) {
  constexpr int n = kWidth<T>;
  Vector<T> sum[kInputs][kVectors] = {};
  for (int64_t h = first; h < end; ++h) {
    const int64_t y = h * in.stride + dy;
    if (y < 0 || y >= in.height) continue;
    const T* x = in.at(block, y, dx) + channel;
    const T* g = grad.at(vector, h, 0);
    for (int64_t w = 0; w < grad.width; ++w, x += in.lanes, g += n) {
      Vector<T> outputs[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) outputs[v] = load(g + v * grad.block());
#pragma GCC unroll 16
      for (int i = 0; i < kInputs; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[i][v] += x[i] * outputs[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kInputs; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      T* const to = sums + (i * kVectors + v) * n;
      store(to, load(to) + sum[i][v]);
    }
  }
}

// The gradients of a layer's parameters: (vectors of outputs, of which some are computed together;
// block of inputs; tap; lane of it; output), then those of the biases.
template <class T>
struct ParameterSums {
  static constexpr int n = kWidth<T>;
  int64_t inputs, outputs, lanes;

  int64_t blocks() const { return (inputs + lanes - 1) / lanes; }
  int64_t vectors() const { return (outputs + n - 1) / n; }
  int group(int64_t left) const { return std::min<int64_t>(left, kConvolvedVectors); }
  int64_t of_vector() const { return blocks() * kPyramidTaps * lanes * n; }
  int64_t size() const { return vectors() * (of_vector() + n); }

  void add(const BlockedMap<T>& in, const BlockedMap<T>& grad, int64_t dilation, T* sums) const {
    T* const of_bias = sums + vectors() * of_vector();
    const int64_t rows = std::max<int64_t>(1, kBandPixels / grad.width);
    for (int64_t first = 0; first < grad.height; first += rows) {
      const int64_t end = std::min(grad.height, first + rows);
      for (int64_t v = 0; v < vectors();) {
        const int together = group(vectors() - v);
        for (int64_t b = 0; b < blocks(); ++b) {
          for (int64_t tap = 0; tap < kPyramidTaps; ++tap) {
            const int64_t dy = (tap / kPyramidSide - 1) * dilation;
            const int64_t dx = (tap % kPyramidSide - 1) * dilation;
            const int64_t place = (b * kPyramidTaps + tap) * lanes * n * together;
            T* const to = sums + v * of_vector() + place;
            if (together == 1) {
              all_inputs<1>(in, b, grad, v, dy, dx, first, end, to);
            } else {
              all_inputs<kConvolvedVectors>(in, b, grad, v, dy, dx, first, end, to);
            }
          }
        }
        v += together;
      }
      for (int64_t v = 0; v < vectors(); ++v) {
        Vector<T> sum{};
        for (int64_t h = first; h < end; ++h) {
          const T* const row = grad.at(v, h, 0);
          for (int64_t w = 0; w < grad.width * n; w += n) sum += load(row + w);
        }
        store(of_bias + v * n, load(of_bias + v * n) + sum);
      }
    }
  }

  // To (outputs, inputs, 3, 3) and (outputs).
  void write(const T* sums, T* weight, T* bias) const {
    const T* const of_bias = sums + vectors() * of_vector();
    std::copy(of_bias, of_bias + outputs, bias);
    for (int64_t v = 0; v < vectors();) {
      const int together = group(vectors() - v);
      const int64_t row = together * n, real = std::min(row, outputs - v * n);
      for (int64_t b = 0; b < blocks(); ++b) {
        const T* const from = sums + v * of_vector() + b * kPyramidTaps * lanes * row;
        const int64_t count = std::min(lanes, inputs - b * lanes);
        for (int64_t o = 0; o < real; ++o) {
          T* const to = weight + ((v * n + o) * inputs + b * lanes) * kPyramidTaps;
          for (int64_t c = 0; c < count; ++c) {
            for (int64_t tap = 0; tap < kPyramidTaps; ++tap) {
              to[c * kPyramidTaps + tap] = from[(tap * lanes + c) * row + o];
            }
          }
        }
      }
      v += together;
    }
  }

 private:
  template <int kVectors>
  void all_inputs(const BlockedMap<T>& in, int64_t block, const BlockedMap<T>& grad, int64_t vector,
                  int64_t dy, int64_t dx, int64_t first, int64_t end, T* to) const {
    constexpr int kMost = kRegisters == 32 ? 16 / kVectors : 8;
    const auto run = [&](auto many) {
      constexpr int kInputs = decltype(many)::value;
      for (int64_t channel = 0; channel < lanes; channel += kInputs) {
        correlate<T, kInputs, kVectors>(in, block, channel, grad, vector, dy, dx, first, end,
                                        to + channel * kVectors * n);
      }
    };
    if (lanes != n) return run(std::integral_constant<int, kFewChannels>{});
    run(std::integral_constant<int, std::min(n, kMost)>{});
  }
};

template <class Element>
class Backward {
 public:
  using T = Compute<Element>;
  static constexpr int n = kWidth<T>;

  Backward(const DilatedPyramidShape& shape, const DilatedPyramidLayers& layers, bool of_x)
      : shape_(shape), layers_(layers), of_x_(of_x) {
    for (size_t i = 0; i <= layers.size(); ++i) {
      const auto reserve = [&](const BlockedMap<T>& map, int64_t (&sizes)[2]) {
        sizes[i % 2] = std::max(sizes[i % 2], size_to_read(map));
      };
      reserve(map(i), map_size_);
      if (i > 0 || of_x) reserve(grad(i), grad_size_);
      if (i == 0) continue;
      if (i > 1 || of_x) {
        packed_size_ += back(i).packed_size();
        back_size_ = std::max(back_size_, back(i).scratch_size());
      }
      sums_size_ += sums(i).size();
    }
    if (spreads()) spread_size_ = size_to_read(spread());
  }

  int64_t packed_size() const { return packed_size_; }
  int64_t sums_size() const { return sums_size_; }
  // Of each thread.
  int64_t scratch_size() const {
    return maps_size() + back_size_ +
           2 * row_scratch<T>(std::max(shape_.width, shape_.out_width()));
  }

  ImageLayout in() const {
    return {shape_.channels, shape_.height, shape_.width, shape_.channels_last};
  }
  ImageLayout all() const {
    return {pyramid_channels(layers_), shape_.out_height(), shape_.out_width(),
            shape_.channels_last};
  }
  ImageLayout out() const {
    ImageLayout layout = all();
    if (shape_.sum) layout.channels = layers_[0].channels;
    return layout;
  }

  void pack(T* to) const {
    for (size_t i = of_x_ ? 1 : 2; i <= layers_.size(); ++i) {
      back(i).pack(static_cast<const T*>(layers_[i - 1].weight), nullptr, true, to);
      to += back(i).packed_size();
    }
  }

  // One image: adds to `sums`, and writes its grad_x.
  void run(const Element* grad_out, const Element* x, const Element* maps, const T* packed,
           T* scratch, T* parameter_sums, Element* grad_x) {
    scratch_ = scratch;
    T *const of_back = scratch + maps_size(), *const row = of_back + back_size_;
    packed += packed_size_;
    parameter_sums += sums_size_;
    int64_t before = all().channels;
    for (size_t i = layers_.size(); i > 0; --i) {
      before -= layers_[i - 1].channels;
      const BlockedMap<T> of_layer = grad(i);
      const int64_t height = of_layer.height, dilation = layers_[i - 1].dilation;
      const bool last = i == layers_.size();
      if (last && shape_.relu) read_map(maps, all(), before, map(i), row, 0, height);
      mask(grad_out, shape_.sum ? 0 : before, map(i), of_layer, !last, row);

      const BlockedMap<T> input = map(i - 1);
      if (i > 1) {
        const int64_t channel = before - layers_[i - 2].channels;
        read_map(maps, all(), channel, input, row, 0, height);
      } else {
        read_map(x, in(), 0, input, row, 0, shape_.height);
      }
      parameter_sums -= sums(i).size();
      sums(i).add(input, of_layer, dilation, parameter_sums);

      if (i == 1 && !of_x_) return;
      packed -= back(i).packed_size();
      const BlockedMap<T> from = i == 1 && spreads() ? spread_out(of_layer) : of_layer;
      const BlockedMap<T> to = grad(i - 1);
      const auto written = [&](int64_t b, int64_t h) {
        if (i > 1) return;
        const int64_t count = std::min<int64_t>(n, to.channels - b * n);
        write_pixels(to.at(b, h, 0), in(), b * n, count, h, row, grad_x);
      };
      back(i).run(from, packed, false, to, 0, to.height, of_back, written);
    }
  }

  void write(const T* parameter_sums, const std::vector<void*>& weights,
             const std::vector<void*>& biases) const {
    for (size_t i = 1; i <= layers_.size(); ++i) {
      sums(i).write(parameter_sums, static_cast<T*>(weights[i - 1]),
                    static_cast<T*>(biases[i - 1]));
      parameter_sums += sums(i).size();
    }
  }

 private:
  // With a stride the gradient of x comes from one with zeros between.
  bool spreads() const { return of_x_ && shape_.stride > 1; }

  Convolution<T> back(size_t i) const {
    const BlockedMap<T> to = grad(i - 1);
    return {grad(i), to.channels, layers_[i - 1].dilation, to.height, to.width};
  }
  int64_t maps_size() const {
    return map_size_[0] + map_size_[1] + grad_size_[0] + grad_size_[1] + spread_size_;
  }
  ParameterSums<T> sums(size_t i) const {
    const BlockedMap<T> input = map(i - 1);
    return {input.channels, layers_[i - 1].channels, input.lanes};
  }

  // f_i, x for i = 0, as the layer after it reads it.
  BlockedMap<T> map(size_t i) const {
    T* const place = scratch_ ? scratch_ + (i % 2 ? map_size_[0] : 0) : nullptr;
    const int64_t margin = i < layers_.size() ? layers_[i].dilation : 0;
    if (i == 0) return input_map(place, in(), margin, shape_.stride);
    return {place, layers_[i - 1].channels, shape_.out_height(), shape_.out_width(), margin, 1, n};
  }
  // The gradient of f_i, of what comes before its activation, of x.
  BlockedMap<T> grad(size_t i) const {
    const int64_t offset = map_size_[0] + map_size_[1] + (i % 2 ? grad_size_[0] : 0);
    T* const place = scratch_ ? scratch_ + offset : nullptr;
    if (i == 0) return {place, shape_.channels, shape_.height, shape_.width, 0, 1, n};
    const int64_t margin = layers_[i - 1].dilation;
    return {place, layers_[i - 1].channels, shape_.out_height(), shape_.out_width(), margin, 1, n};
  }
  BlockedMap<T> spread() const {
    const int64_t offset = map_size_[0] + map_size_[1] + grad_size_[0] + grad_size_[1];
    T* const place = scratch_ ? scratch_ + offset : nullptr;
    const DilatedPyramidLayer& layer = layers_[0];
    return {place, layer.channels, shape_.height, shape_.width, layer.dilation, 1, n};
  }
  BlockedMap<T> spread_out(const BlockedMap<T>& from) const {
    const BlockedMap<T> to = spread();
    std::fill(to.data, to.data + to.size(), T(0));
    for (int64_t b = 0; b < from.blocks(); ++b) {
      for (int64_t h = 0; h < from.height; ++h) {
        const T* pixel = from.at(b, h, 0);
        for (int64_t w = 0; w < from.width; ++w, pixel += n) {
          store(to.at(b, h * shape_.stride, w * shape_.stride), load(pixel));
        }
      }
    }
    return to;
  }

  // grad = grad_out, plus what it holds if `add`, 0 where f <= 0.
  void mask(const Element* grad_out, int64_t channel, const BlockedMap<T>& f,
            const BlockedMap<T>& grad, bool add, T* row) const {
    T* const pixels = row + row_scratch<T>(std::max(shape_.width, shape_.out_width()));
    for (int64_t b = 0; b < grad.blocks(); ++b) {
      grad.clear_margins(b, 0, grad.height);
      const int64_t count = std::min<int64_t>(n, grad.channels - b * n);
      for (int64_t h = 0; h < grad.height; ++h) {
        read_pixels(grad_out, out(), channel + b * n, count, h, pixels, n, row);
        T *const to = grad.at(b, h, 0), *const gate = f.at(b, h, 0);
        for (int64_t w = 0; w < grad.width * n; w += n) {
          Vector<T> sum = load(pixels + w);
          if (add) sum += load(to + w);
          if (shape_.relu) sum = load(gate + w) <= Vector<T>{} ? Vector<T>{} : sum;
          store(to + w, sum);
        }
      }
    }
  }

  const DilatedPyramidShape& shape_;
  const DilatedPyramidLayers& layers_;
  bool of_x_;
  T* scratch_ = nullptr;  // of the image at hand
  int64_t packed_size_ = 0, sums_size_ = 0, spread_size_ = 0, back_size_ = 0;
  int64_t map_size_[2] = {}, grad_size_[2] = {};
};

template <class Element>
bool backward(const Element* grad_out, const Element* x, const Element* maps,
              const DilatedPyramidLayers& layers, const DilatedPyramidGradients& gradients,
              const DilatedPyramidShape& shape, int threads) {
  using T = Compute<Element>;
  const Backward<Element> plan(shape, layers, gradients.x != nullptr);
  const int64_t fitting = std::max<int64_t>(1, kPartNumbers / plan.sums_size());
  const int64_t parts = std::min({shape.batch, kParts, fitting});
  const int64_t workers = std::min<int64_t>(parts, threads);
  const int64_t size =
      plan.packed_size() + parts * plan.sums_size() + workers * plan.scratch_size();
  T* const packed = static_cast<T*>(thread_scratch(static_cast<size_t>(size) * sizeof(T)));
  if (!packed) return false;
  T* const sums = packed + plan.packed_size();
  T* const scratch = sums + parts * plan.sums_size();
  plan.pack(packed);
  parallel_for(workers, threads, [&](int64_t worker) {
    Backward<Element> own = plan;
    for (int64_t part = worker; part < parts; part += workers) {
      T* const of_part = sums + part * own.sums_size();
      std::fill(of_part, of_part + own.sums_size(), T(0));
      for (int64_t i = part * shape.batch / parts; i < (part + 1) * shape.batch / parts; ++i) {
        Element* const grad_x = static_cast<Element*>(gradients.x);
        own.run(grad_out + i * own.out().size(), x + i * own.in().size(),
                maps + i * own.all().size(), packed, scratch + worker * own.scratch_size(), of_part,
                grad_x ? grad_x + i * own.in().size() : nullptr);
      }
    }
  });
  for (int64_t part = 1; part < parts; ++part) {
    const T* const from = sums + part * plan.sums_size();
    for (int64_t i = 0; i < plan.sums_size(); i += kWidth<T>) {
      store(sums + i, load(sums + i) + load(from + i));
    }
  }
  plan.write(sums, gradients.weights, gradients.biases);
  return true;
}

}  // namespace

bool dilated_pyramid_backward(const void* grad_out, const void* x, const void* maps,
                              const DilatedPyramidLayers& layers,
                              const DilatedPyramidGradients& gradients,
                              const DilatedPyramidShape& shape, DType dtype, int threads) {
  bool ran = false;
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    ran = backward(static_cast<const Element*>(grad_out), static_cast<const Element*>(x),
                   static_cast<const Element*>(maps), layers, gradients, shape, threads);
  });
  return ran;
}

}  // namespace kernelpose::cpu::KP_ISA
