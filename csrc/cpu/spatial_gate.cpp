// SCConv's spatial gate on the CPU: an image is summed and then written while it is in the cache.
// A channel and its partner in the other half are read together, for each goes into the other's
// result.
#include "spatial_gate.h"

#include <cmath>

#include "channel_passes.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

// t = (x - mean) scale + offset for the channels of a block, [1] for their partners.
template <class T>
struct GateFactors {
  alignas(kVectorBytes) T mean[2][kChannelBlock];
  T scale[2][kChannelBlock];
  T offset[2][kChannelBlock];
};

// The sigmoid, to more digits than Element's.
template <class Element, class V>
inline V sigmoid_for(V t) {
  if constexpr (std::is_same_v<Element, BFloat16> && std::is_same_v<V, FloatVector>) {
    return rough_sigmoid(t);
  } else {
    return sigmoid(t);
  }
}

// What both directions are made of.
template <class Element>
struct Gate {
  using T = Compute<Element>;
  const SpatialGateShape& shape;
  const Element* x;
  const T* weight;
  const T* bias;
  T* statistics;
  T* scratch;
  T inverse_sum;  // of the weights

  // Row of an image in the part-th of the scratch.
  T* row(int part, int64_t image) const {
    return scratch + (part * shape.maps.batch + image) * shape.maps.channels;
  }
  T share(int64_t c) const { return weight[c] * inverse_sum; }

  // visit(half, channel, group, begin, end): for each group that `count` channels from `first` on,
  // or their partners, meet: its part of them, begin to end in the block, `channel` at begin.
  template <class Visit>
  void for_each_group(int64_t first, int64_t count, const Visit& visit) const {
    const int64_t size = shape.group_channels();
    for (int half = 0; half < 2; ++half) {
      for (int64_t begin = 0, end; begin < count; begin = end) {
        const int64_t channel = first + half * shape.pairs() + begin, group = channel / size;
        end = std::min(count, begin + (group + 1) * size - channel);
        visit(half, channel, group, begin, end);
      }
    }
  }

  void fill(GateFactors<T>& to, int half, int64_t channel, int64_t begin, int64_t end, T mean,
            T deviation) const {
    for (int64_t i = begin; i < end; ++i, ++channel) {
      to.mean[half][i] = mean;
      to.scale[half][i] = share(channel) * weight[channel] * deviation;
      to.offset[half][i] = share(channel) * bias[channel];
    }
  }

  T* statistics_of(int64_t image, int64_t group) const {
    return statistics + 2 * (image * shape.groups + group);
  }

  int prepare(int64_t) const { return 0; }

  // Both passes, threads and all, over channels of the first half and their partners.
  template <class Op>
  static void run(const Op& op, int threads) {
    const Maps& maps = op.shape.maps;
    run_channel_passes({maps.batch, op.shape.pairs(), 2 * maps.pixels, false}, threads, op);
  }
};

template <class Element>
struct Forward : Gate<Element> {
  using T = Compute<Element>;
  Element* out;

  // Mean, and sum of squared differences from it, of each channel, in one pass: differences from
  // its first pixel are summed. However far that is from the mean m, the digits that the variance
  // loses are bounded: (first - m)^2 is itself a part of it.
  void reduce(int64_t image, int64_t begin, int64_t total) const {
    const Maps& maps = this->shape.maps;
    const Element* const from = this->x + image * maps.image();
    const T pixels = static_cast<T>(maps.pixels);
    alignas(kVectorBytes) T origin[kChannelBlock];
    for (const int64_t start : {begin, begin + this->shape.pairs()}) {
      for (int64_t first = start; first < start + total; first += kChannelBlock) {
        const int64_t count = std::min(kChannelBlock, start + total - first);
        T* const mean = this->row(0, image) + first;
        T* const squares = this->row(1, image) + first;
        for (int64_t c = 0; c < count; ++c) {
          origin[c] = to_compute(from[(first + c) * (maps.channels_last ? 1 : maps.pixels)]);
        }
        sum_over_pixels<1, 2, Element>(maps, {from}, first, count, std::array<const T*, 1>{origin},
                                       {mean, squares},
                                       [](const auto& in, const auto& f, auto& sum) {
                                         const auto difference = in[0] - f[0];
                                         sum[0] += difference;
                                         sum[1] += difference * difference;
                                       });
        for (int64_t c = 0; c < count; ++c) {
          const T shift = mean[c] / pixels;
          const T rest = squares[c] - shift * mean[c];
          squares[c] = rest < 0 ? T(0) : rest;
          mean[c] = origin[c] + shift;
        }
      }
    }
  }

  void group_statistics(int64_t image, int64_t group, T& mean, T& deviation) const {
    const int64_t size = this->shape.group_channels();
    const T* const means = this->row(0, image) + group * size;
    const T pixels = static_cast<T>(this->shape.maps.pixels);
    mean = sum_numbers(means, size) / static_cast<T>(size);
    T between = 0;
    for (int64_t c = 0; c < size; ++c) between += (means[c] - mean) * (means[c] - mean);
    const T within = sum_numbers(this->row(1, image) + group * size, size);
    const T variance = (within + pixels * between) / (pixels * static_cast<T>(size));
    deviation = T(1) / std::sqrt(variance + static_cast<T>(this->shape.eps));
  }

  void apply(int64_t image, int, int64_t first, int64_t count) const {
    const SpatialGateShape& shape = this->shape;
    GateFactors<T> f;
    this->for_each_group(first, count,
                         [&](int half, int64_t channel, int64_t group, int64_t begin, int64_t end) {
                           T mean, deviation;
                           group_statistics(image, group, mean, deviation);
                           this->fill(f, half, channel, begin, end, mean, deviation);
                           if (channel == group * shape.group_channels()) {
                             this->statistics_of(image, group)[0] = mean;
                             this->statistics_of(image, group)[1] = deviation;
                           }
                         });
    const Element* const from = this->x + image * shape.maps.image();
    Element* const to = out + image * shape.maps.image();
    const T limit = static_cast<T>(shape.limit);
    scale_channels<2, 2, 6, Element>(
        shape.maps, {from, from + shape.to_partner()}, {to, to + shape.to_partner()}, first, count,
        {f.mean[0], f.scale[0], f.offset[0], f.mean[1], f.scale[1], f.offset[1]},
        [limit](const auto& in, const auto& f, auto& result) {
          using V = std::decay_t<decltype(in[0])>;
          V kept[2], rest[2];
          for (int h = 0; h < 2; ++h) {
            const V t = (in[h] - f[3 * h]) * f[3 * h + 1] + f[3 * h + 2];
            const V weak = sigmoid_for<Element>(t) * in[h];
            kept[h] = t > limit ? in[h] : weak;
            rest[h] = t > limit ? V{} : weak;
          }
          result[0] = kept[0] + rest[1];
          result[1] = kept[1] + rest[0];
        });
  }
};

template <class Element>
struct Backward : Gate<Element> {
  using T = Compute<Element>;
  const Element* grad_out;
  Element* grad_x;

  // What t and x themselves get from the gradients of a channel's result and its partner's.
  template <class V>
  static void through_gate(V t, V x, V own, V partner, T limit, V& to_t, V& to_x) {
    const V r = sigmoid(t), weak = r * (own + partner);
    to_t = t > limit ? V{} : x * weak * (1 - r);
    to_x = t > limit ? own : weak;
  }

  void reduce(int64_t image, int64_t begin, int64_t total) const {
    const SpatialGateShape& shape = this->shape;
    const int64_t at = image * shape.maps.image();
    const Element* const x = this->x + at;
    const Element* const g = grad_out + at;
    const T limit = static_cast<T>(shape.limit);
    for (int64_t first = begin; first < begin + total; first += kChannelBlock) {
      const int64_t count = std::min(kChannelBlock, begin + total - first);
      GateFactors<T> f;
      this->for_each_group(
          first, count, [&](int half, int64_t channel, int64_t group, int64_t begin, int64_t end) {
            const T* const statistics = this->statistics_of(image, group);
            this->fill(f, half, channel, begin, end, statistics[0], statistics[1]);
          });
      T* const u0 = this->row(0, image) + first;
      T* const u1 = this->row(1, image) + first;
      sum_over_pixels<4, 4, Element>(
          shape.maps, {x, x + shape.to_partner(), g, g + shape.to_partner()}, first, count,
          std::array<const T*, 6>{f.mean[0], f.scale[0], f.offset[0], f.mean[1], f.scale[1],
                                  f.offset[1]},
          {u0, u0 + shape.pairs(), u1, u1 + shape.pairs()},
          [limit](const auto& in, const auto& f, auto& sum) {
            using V = std::decay_t<decltype(in[0])>;
            for (int h = 0; h < 2; ++h) {
              const V centred = in[h] - f[3 * h];
              V u, unused;
              through_gate<V>(centred * f[3 * h + 1] + f[3 * h + 2], in[h], in[2 + h], in[3 - h],
                              limit, u, unused);
              sum[h] += u;
              sum[2 + h] += u * centred;
            }
          });
      this->for_each_group(first, count,
                           [&](int half, int64_t, int64_t group, int64_t begin, int64_t end) {
                             const T deviation = this->statistics_of(image, group)[1];
                             for (int64_t i = begin; i < end; ++i)
                               u1[half * shape.pairs() + i] *= deviation;
                           });
    }
  }

  void apply(int64_t image, int, int64_t first, int64_t count) const {
    const SpatialGateShape& shape = this->shape;
    const int64_t size = shape.group_channels();
    GateFactors<T> f;
    // Of (x - mean), and of 1: what the group's deviation and mean give back.
    alignas(kVectorBytes) T slope[2][kChannelBlock], constant[2][kChannelBlock];
    this->for_each_group(
        first, count, [&](int half, int64_t channel, int64_t group, int64_t begin, int64_t end) {
          const T* const statistics = this->statistics_of(image, group);
          const T deviation = statistics[1];
          T of_mean = 0, of_deviation = 0;
          for (int64_t c = group * size; c < (group + 1) * size; ++c) {
            of_mean += this->share(c) * this->weight[c] * this->row(0, image)[c];
            of_deviation += this->share(c) * this->weight[c] * this->row(1, image)[c];
          }
          const T factor = -deviation / static_cast<T>(size * shape.maps.pixels);
          this->fill(f, half, channel, begin, end, statistics[0], deviation);
          std::fill(slope[half] + begin, slope[half] + end, factor * deviation * of_deviation);
          std::fill(constant[half] + begin, constant[half] + end, factor * of_mean);
        });
    const int64_t at = image * shape.maps.image();
    const Element* const x = this->x + at;
    const Element* const g = grad_out + at;
    Element* const to = grad_x + at;
    const T limit = static_cast<T>(shape.limit);
    scale_channels<4, 2, 10, Element>(
        shape.maps, {x, x + shape.to_partner(), g, g + shape.to_partner()},
        {to, to + shape.to_partner()}, first, count,
        {f.mean[0], f.scale[0], f.offset[0], slope[0], constant[0], f.mean[1], f.scale[1],
         f.offset[1], slope[1], constant[1]},
        [limit](const auto& in, const auto& f, auto& result) {
          using V = std::decay_t<decltype(in[0])>;
          for (int h = 0; h < 2; ++h) {
            const auto* const own = f + 5 * h;
            const V centred = in[h] - own[0];
            V u, direct;
            through_gate<V>(centred * own[1] + own[2], in[h], in[2 + h], in[3 - h], limit, u,
                            direct);
            result[h] = direct + u * own[1] + (centred * own[3] + own[4]);
          }
        });
  }

  // The gradients of weight, which is in the normalisation and in every share, and of bias.
  void parameters(T* grad_weight, T* grad_bias) const {
    const int64_t channels = this->shape.maps.channels;
    std::fill(grad_weight, grad_weight + channels, T(0));
    std::fill(grad_bias, grad_bias + channels, T(0));
    for (int64_t image = 0; image < this->shape.maps.batch; ++image) {
      for (int64_t c = 0; c < channels; ++c) {
        grad_bias[c] += this->row(0, image)[c];
        grad_weight[c] += this->row(1, image)[c];
      }
    }
    const auto of_share = [&](int64_t c) {
      return this->weight[c] * grad_weight[c] + this->bias[c] * grad_bias[c];
    };
    T shared = 0;
    for (int64_t c = 0; c < channels; ++c) shared += this->share(c) * of_share(c);
    for (int64_t c = 0; c < channels; ++c) {
      const T through_share = (of_share(c) - shared) * this->inverse_sum;
      grad_weight[c] = this->share(c) * grad_weight[c] + through_share;
      grad_bias[c] = this->share(c) * grad_bias[c];
    }
  }
};

template <class Element>
Gate<Element> gate_of(const void* x, const void* weight, const void* bias, void* statistics,
                      void* scratch, const SpatialGateShape& shape) {
  using T = Compute<Element>;
  const T* const weights = static_cast<const T*>(weight);
  return {shape,
          static_cast<const Element*>(x),
          weights,
          static_cast<const T*>(bias),
          static_cast<T*>(statistics),
          static_cast<T*>(scratch),
          T(1) / sum_numbers(weights, shape.maps.channels)};
}

}  // namespace

void spatial_gate_forward(const void* x, const void* weight, const void* bias, void* out,
                          void* statistics, void* scratch, const SpatialGateShape& shape,
                          DType dtype, int threads) {
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    const Forward<Element> forward{gate_of<Element>(x, weight, bias, statistics, scratch, shape),
                                   static_cast<Element*>(out)};
    Gate<Element>::run(forward, threads);
  });
}

void spatial_gate_backward(const void* grad_out, const void* x, const void* weight,
                           const void* bias, const void* statistics, void* grad_x,
                           void* grad_weight, void* grad_bias, void* scratch,
                           const SpatialGateShape& shape, DType dtype, int threads) {
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    using T = Compute<Element>;
    const Backward<Element> backward{
        gate_of<Element>(x, weight, bias, const_cast<void*>(statistics), scratch, shape),
        static_cast<const Element*>(grad_out), static_cast<Element*>(grad_x)};
    Gate<Element>::run(backward, threads);
    backward.parameters(static_cast<T*>(grad_weight), static_cast<T*>(grad_bias));
  });
}

}  // namespace kernelpose::cpu::KP_ISA
