// A depthwise convolution and the two products after it, for a few pixels at a time: neither what
// lies between nor the wide map leaves the second level of the cache.
#include "depthwise_ffn.h"

#include <algorithm>

#include "packed_product.h"
#include "parallel.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

constexpr int n = kWidth<float>;
constexpr int kTaps = 9;
constexpr int kTogether = 4;     // neighbours of a row whose sums lie in registers
constexpr int64_t kPixels = 96;  // that go through all layers together

class DepthwiseFFN {
 public:
  DepthwiseFFN(const DepthwiseFFNShape& shape, const float* x, const float* packed, float* out)
      : shape_(shape), x_(x), out_(out), taps_(packed) {
    const int64_t weights = shape.channels * shape.hidden;
    tap_bias_ = taps_ + kTaps * shape.channels;
    expand_ = tap_bias_ + shape.channels;
    expand_bias_ = expand_ + weights;
    project_ = expand_bias_ + shape.hidden;
    project_bias_ = project_ + weights;
  }

  // Zeros for a pixel beyond the map, the first sum of so many pixels, and their wide map.
  static int64_t scratch_size(const DepthwiseFFNShape& shape, int64_t pixels) {
    return shape.channels + pixels * (shape.channels + shape.hidden);
  }

  // Pixels [first, first + count) of all images.
  void run(int64_t first, int64_t count, float* memory) const {
    const int64_t channels = shape_.channels, hidden = shape_.hidden;
    float* const zeros = memory;
    float* const sum = zeros + channels;
    float* const wide = sum + count * channels;
    std::fill(zeros, sum, 0.0f);
    for (int64_t done = 0; done < count;) {
      const int64_t pixel = first + done, column = pixel % shape_.width;
      const int64_t rest = std::min(count - done, shape_.width - column);
      float* const to = sum + done * channels;
      if (rest >= kTogether) {
        depthwise<kTogether>(pixel, zeros, to);
        done += kTogether;
      } else {
        depthwise<1>(pixel, zeros, to);
        ++done;
      }
    }
    packed_product(sum, channels, count, channels, hidden, expand_, expand_bias_,
                   [&](int64_t pixel, int64_t output, FloatVector result) {
                     // In this order NaN stays.
                     store(wide + pixel * hidden + output, maximum(FloatVector{}, result));
                   });
    float* const out = out_ + first * channels;
    packed_product(wide, hidden, count, hidden, channels, project_, project_bias_,
                   [&](int64_t pixel, int64_t output, FloatVector result) {
                     const int64_t at = pixel * channels + output;
                     store(out + at, load(sum + at) + result);
                   });
  }

 private:
  // x + depthwise(x) of neighbours in a row.
  template <int kCount>
  void depthwise(int64_t pixel, const float* zeros, float* to) const {
    constexpr int kColumns = kCount + 2;
    const int64_t channels = shape_.channels, width = shape_.width;
    const int64_t row = pixel / width % shape_.height, column = pixel % width;
    const float* from[3][kColumns];
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        const int64_t y = row + i - 1, x = column + j - 1;
        const bool exists = y >= 0 && y < shape_.height && x >= 0 && x < width;
        from[i][j] = exists ? x_ + (pixel + (i - 1) * width + j - 1) * channels : zeros;
      }
    }
    const float *const taps = taps_, *const biases = tap_bias_;
    for (int64_t c = 0; c < channels; c += n) {
      FloatVector sum[kCount];
#pragma GCC unroll 4
      for (int p = 0; p < kCount; ++p) sum[p] = load(biases + c);
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        FloatVector weight[3];
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) weight[j] = load(taps + (3 * i + j) * channels + c);
#pragma GCC unroll 6
        for (int j = 0; j < kColumns; ++j) {
          const FloatVector value = load(from[i][j] + c);
#pragma GCC unroll 4
          for (int p = 0; p < kCount; ++p) {
            if (j >= p && j < p + 3) sum[p] += value * weight[j - p];
          }
        }
      }
#pragma GCC unroll 4
      for (int p = 0; p < kCount; ++p) {
        store(to + p * channels + c, load(from[1][p + 1] + c) + sum[p]);
      }
    }
  }

  const DepthwiseFFNShape& shape_;
  const float* x_;
  float* out_;
  const float *taps_, *tap_bias_, *expand_, *expand_bias_, *project_, *project_bias_;
};

}  // namespace

int64_t depthwise_ffn_panel() { return kProductOutputs; }

bool depthwise_ffn_forward(const float* x, const float* packed, float* out,
                           const DepthwiseFFNShape& shape, int threads) {
  const DepthwiseFFN layers(shape, x, packed, out);
  const int64_t pixels = shape.batch * shape.height * shape.width;
  const int64_t share = round_up((pixels + threads - 1) / threads, kProductPixels);
  const int64_t count = std::min(kPixels, share), units = (pixels + count - 1) / count;
  const int64_t parts = std::min<int64_t>(threads, units);
  const int64_t scratch = DepthwiseFFN::scratch_size(shape, count);
  auto* const memory =
      static_cast<float*>(thread_scratch(static_cast<size_t>(parts * scratch) * sizeof(float)));
  if (!memory) return false;
  parallel_for(parts, threads, [&](int64_t part) {
    for (int64_t unit = part * units / parts; unit < (part + 1) * units / parts; ++unit) {
      const int64_t first = unit * count;
      layers.run(first, std::min(count, pixels - first), memory + part * scratch);
    }
  });
  return true;
}

}  // namespace kernelpose::cpu::KP_ISA
