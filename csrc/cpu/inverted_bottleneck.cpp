// Two 1x1 convolutions and what lies between, a few rows of the wide map at a time: these never
// leave the second level of the cache.
#include "inverted_bottleneck.h"

#include <algorithm>

#include "matmul.h"
#include "parallel.h"
#include "transpose.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

constexpr int n = kWidth<float>;
constexpr int kRing = 3;         // rows of the wide map that an output row needs
constexpr int kPixels = 4;       // outputs of a row whose sums lie in registers
constexpr int64_t kTokens = 48;  // a "row" where no neighbours are needed

// x / (1 + e^-x); far out, where e^-x overflows, it is 0 but for 1e-36.
inline FloatVector silu(FloatVector x) {
  x = maximum(broadcast(-88.0f), x);  // in this order it keeps NaN
  return x / (1.0f + power_of_two(x * static_cast<float>(-kLog2E)));
}

template <Activation kAct>
inline FloatVector activate(FloatVector x) {
  if constexpr (kAct == Activation::kRelu) return maximum(FloatVector{}, x);  // so it keeps NaN
  if constexpr (kAct == Activation::kSilu) return silu(x);
  return x;
}

template <class F>
inline void with_activation(Activation act, F run) {
  switch (act) {
    case Activation::kNone:
      return run(std::integral_constant<Activation, Activation::kNone>{});
    case Activation::kRelu:
      return run(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kSilu:
      return run(std::integral_constant<Activation, Activation::kSilu>{});
  }
}

// A weight (outputs, inputs) as matmul reads it, and its bias, both padded to whole vectors by 0.
struct Packed {
  int64_t inputs, padded;
  float *weight, *bias;

  static int64_t size(int64_t inputs, int64_t outputs) {
    return (inputs + 1) * round_up(outputs, kPanel<float>);
  }
  // Puts itself at `memory`.
  Packed(const float* from, const float* from_bias, int64_t inputs, int64_t outputs, float* memory)
      : inputs(inputs), padded(round_up(outputs, n)), weight(memory) {
    constexpr int64_t panel = kPanel<float>;
    bias = memory + inputs * round_up(outputs, panel);
    std::fill(memory, memory + size(inputs, outputs), 0.0f);
    for (int64_t o = 0; o < outputs; o += panel) {
      transpose(from + o * inputs, std::min(panel, outputs - o), inputs, inputs,
                weight + o * inputs, panel);
    }
    std::copy_n(from_bias, outputs, bias);
  }
  // to (pixels, padded) = bias + from (pixels, inputs) times the weight
  void apply(const float* from, int64_t from_row, int64_t pixels, float* to) const {
    for (int64_t p = 0; p < pixels; ++p) std::copy_n(bias, padded, to + p * padded);
    matmul<float, true>(pixels, padded, inputs, {from, from_row, 1}, weight, kPanel<float>,
                        inputs * kPanel<float>, to, padded);
  }
};

class Bottleneck {
 public:
  Bottleneck(const InvertedBottleneckShape& shape, const InvertedBottleneckWeights& weights,
             float* memory)
      : shape_(shape),
        wide_(round_up(shape.hidden, n)),
        expand_(weights.expand, weights.expand_bias, shape.inputs, shape.hidden, memory),
        project_(weights.project, weights.project_bias, shape.hidden, shape.outputs,
                 memory + Packed::size(shape.inputs, shape.hidden)),
        taps_(nullptr) {
    if (!weights.depthwise) return;
    taps_ = memory + Packed::size(shape.inputs, shape.hidden) +
            Packed::size(shape.hidden, shape.outputs);
    std::fill(taps_, taps_ + (kBottleneckTaps + 1) * wide_, 0.0f);
    transpose(weights.depthwise, shape.hidden, kBottleneckTaps, kBottleneckTaps, taps_, wide_);
    std::copy_n(weights.depthwise_bias, shape.hidden, taps_ + kBottleneckTaps * wide_);
  }

  static int64_t packed_size(const InvertedBottleneckShape& shape) {
    const int64_t wide = round_up(shape.hidden, n);
    return Packed::size(shape.inputs, shape.hidden) + Packed::size(shape.hidden, shape.outputs) +
           (kBottleneckTaps + 1) * wide;
  }
  // Of one thread: the ring and a row of zeros, an activated row, a row of results.
  static int64_t scratch_size(const InvertedBottleneckShape& shape) {
    const int64_t wide = round_up(shape.hidden, n);
    return (kRing + 1) * (shape.width + 2) * wide + shape.out_width() * wide +
           shape.out_width() * round_up(shape.outputs, n);
  }

  // Output rows [first, end) of an image.
  void run_rows(const float* x, float* out, int64_t first, int64_t end, float* memory) const {
    const int64_t row = (shape_.width + 2) * wide_, columns = shape_.out_width();
    float* const zeros = memory + kRing * row;
    float* const activated = zeros + row;
    float* const result = activated + columns * wide_;
    std::fill(memory, activated, 0.0f);  // the margins stay so
    int64_t made = std::max<int64_t>(0, first * shape_.stride - 1);
    for (int64_t y = first; y < end; ++y) {
      const int64_t top = y * shape_.stride - 1;
      for (; made < std::min(shape_.height, top + 3); ++made) {
        float* const to = memory + made % kRing * row + wide_;
        expand_.apply(x + made * shape_.width * shape_.inputs, shape_.inputs, shape_.width, to);
        activate_row(shape_.act1, to, shape_.width * wide_);
      }
      const float* rows[3];
      for (int64_t i = 0; i < 3; ++i) {
        const bool exists = top + i >= 0 && top + i < shape_.height;
        rows[i] = exists ? memory + (top + i) % kRing * row : zeros;
      }
      with_activation(shape_.act2, [&](auto act) {
        shape_.stride == 1 ? depthwise<1, decltype(act)::value>(rows, columns, activated)
                           : depthwise<2, decltype(act)::value>(rows, columns, activated);
      });
      finish(activated, columns, x + y * shape_.width * shape_.inputs,
             out + y * columns * shape_.outputs, result);
    }
  }

  // Without neighbours: tokens, kTokens at most.
  void run_tokens(const float* x, float* out, int64_t tokens, float* memory) const {
    expand_.apply(x, shape_.inputs, tokens, memory);
    activate_row(shape_.act1, memory, tokens * wide_);
    finish(memory, tokens, x, out, memory + tokens * wide_);
  }

 private:
  static void activate_row(Activation act, float* row, int64_t count) {
    if (act == Activation::kNone) return;
    with_activation(act, [&](auto a) {
      for (int64_t i = 0; i < count; i += n)
        store(row + i, activate<decltype(a)::value>(load(row + i)));
    });
  }

  template <int kStride, Activation kAct>
  void depthwise(const float* const (&rows)[3], int64_t columns, float* to) const {
    int64_t column = 0;
    for (; column + kPixels <= columns; column += kPixels) {
      depthwise_pixels<kStride, kPixels, kAct>(rows, column, to + column * wide_);
    }
    for (; column < columns; ++column) {
      depthwise_pixels<kStride, 1, kAct>(rows, column, to + column * wide_);
    }
  }

  template <int kStride, int kCount, Activation kAct>
  void depthwise_pixels(const float* const (&rows)[3], int64_t column, float* to) const {
    constexpr int kColumns = (kCount - 1) * kStride + 3;
    const int64_t at = column * kStride * wide_, wide = wide_;
    const float *const top = rows[0] + at, *const middle = rows[1] + at, *const low = rows[2] + at;
    const float* const taps = taps_;
    for (int64_t c = 0; c < wide; c += n) {
      FloatVector sum[kCount];
      const FloatVector bias = load(taps + kBottleneckTaps * wide + c);
#pragma GCC unroll 4
      for (int p = 0; p < kCount; ++p) sum[p] = bias;
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const float* const row = i == 0 ? top : i == 1 ? middle : low;
        FloatVector weight[3];
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) weight[j] = load(taps + (3 * i + j) * wide + c);
#pragma GCC unroll 9
        for (int j = 0; j < kColumns; ++j) {
          const FloatVector value = load(row + j * wide + c);
#pragma GCC unroll 4
          for (int p = 0; p < kCount; ++p) {
            const int tap = j - p * kStride;
            if (tap >= 0 && tap < 3) sum[p] += value * weight[tap];
          }
        }
      }
#pragma GCC unroll 4
      for (int p = 0; p < kCount; ++p) store(to + p * wide + c, activate<kAct>(sum[p]));
    }
  }

  // out = [x +] project(wide map)
  void finish(const float* from, int64_t pixels, const float* x, float* out, float* result) const {
    const int64_t outputs = shape_.outputs, padded = project_.padded;
    float* const to = padded == outputs ? out : result;
    project_.apply(from, wide_, pixels, to);
    for (int64_t p = 0; p < pixels && (shape_.residual || to != out); ++p) {
      float* const pixel = out + p * outputs;
      const float* const sum = to + p * padded;
      const float* const before = x + p * outputs;
      if (shape_.residual) {
        for (int64_t c = 0; c < outputs; ++c) pixel[c] = sum[c] + before[c];
      } else {
        std::copy_n(sum, outputs, pixel);
      }
    }
  }

  const InvertedBottleneckShape& shape_;
  int64_t wide_;  // hidden channels in whole vectors
  Packed expand_, project_;
  float* taps_;  // (9, wide), and their bias
};

}  // namespace

bool inverted_bottleneck_forward(const float* x, const InvertedBottleneckWeights& weights,
                                 float* out, const InvertedBottleneckShape& shape, int threads) {
  const bool tokens = !weights.depthwise;
  // Bands of an image, so that every thread has one.
  const int64_t count = shape.batch * shape.height * shape.width, rows = shape.out_height();
  const int64_t bands = std::clamp<int64_t>((threads + shape.batch - 1) / shape.batch, 1, rows);
  const int64_t units = tokens ? (count + kTokens - 1) / kTokens : shape.batch * bands;
  const int64_t parts = std::min<int64_t>(threads, units);
  const int64_t scratch = tokens
                              ? kTokens * (round_up(shape.hidden, n) + round_up(shape.outputs, n))
                              : Bottleneck::scratch_size(shape);
  const int64_t packed = Bottleneck::packed_size(shape);
  auto* const memory = static_cast<float*>(
      thread_scratch(static_cast<size_t>(packed + parts * scratch) * sizeof(float)));
  if (!memory) return false;
  const Bottleneck bottleneck(shape, weights, memory);
  parallel_for(parts, threads, [&](int64_t part) {
    float* const own = memory + packed + part * scratch;
    for (int64_t unit = part * units / parts; unit < (part + 1) * units / parts; ++unit) {
      if (tokens) {
        const int64_t first = unit * kTokens;
        bottleneck.run_tokens(x + first * shape.inputs, out + first * shape.outputs,
                              std::min(kTokens, count - first), own);
        continue;
      }
      const int64_t image = unit / bands, band = unit % bands;
      bottleneck.run_rows(x + image * shape.height * shape.width * shape.inputs,
                          out + image * rows * shape.out_width() * shape.outputs,
                          band * rows / bands, (band + 1) * rows / bands, own);
    }
  });
  return true;
}

}  // namespace kernelpose::cpu::KP_ISA
