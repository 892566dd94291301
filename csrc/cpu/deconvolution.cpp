// A deconvolution of kernel 4 and stride 2 is, for each of the four phases of its result, a 2x2
// convolution. 2 x 2 of these outputs at once are 9 products of matrices over the channels in place
// of 16, Winograd's F(2x2, 2x2) ("Fast Algorithms for Convolutional Neural Networks", Lavin and
// Gray, 2016): along one axis, with u, v, w three neighbours and g, h the kernel,
//   u g + v h = (u - v) g + v (g + h),   v g + w h = v (g + h) - (v - w) h.
// A tile is 2 x 2 inputs and thus 4 x 4 outputs: 36 products, whose factors of the input are 25,
// five along an axis: with d the rows before, in and after the tile, d0 - d1, d1, d1 - d2, d2 and
// d2 - d3, of which phase 0 takes the first three and phase 1 the last.
#include "deconvolution.h"

#include <algorithm>

#include "matmul.h"
#include "parallel.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

constexpr int n = kWidth<float>;
constexpr int64_t kOutputs = kPanel<float>;  // channels of a panel
constexpr int kPanelParts = kPanelVectors;
constexpr int kPositions = 3;  // of a phase, along an axis
constexpr int kProducts = 4 * kPositions * kPositions;
constexpr int64_t kTiles = 96;  // whose products stay in the second level of the cache

// Which product: in phase (a, b), position (i, j). Neighbours share the factor of the input.
constexpr int product(int a, int i, int b, int j) { return ((a * 3 + i) * 2 + b) * 3 + j; }

// The taps of phase a for the earlier and the later of two inputs.
constexpr int earlier(int a) { return 3 - a; }
constexpr int later(int a) { return 1 - a; }

class Deconvolution {
 public:
  Deconvolution(const DeconvolutionShape& shape, const float* x, const float* packed,
                const float* bias, float* out)
      : shape_(shape),
        rows_((shape.height + 1) / 2),
        columns_((shape.width + 1) / 2),
        x_(x),
        packed_(packed),
        bias_(bias),
        out_(out) {}

  int64_t tiles() const { return shape_.batch * rows_ * columns_; }
  static int64_t panels(int64_t outputs) { return (outputs + kOutputs - 1) / kOutputs; }
  // Zeros, a factor and all products of so many tiles.
  int64_t scratch_size(int64_t tiles) const {
    return round_up(shape_.inputs, n) + round_up(tiles * shape_.inputs, n) +
           kProducts * tiles * kOutputs;
  }

  // The results of one panel in tiles [first, first + count).
  void run(int64_t first, int64_t count, int64_t panel, float* memory) const {
    const int64_t inputs = shape_.inputs;
    const int64_t width = std::min(kOutputs, round_up(shape_.outputs - panel * kOutputs, n));
    float* const zeros = memory;
    float* const factor = zeros + round_up(inputs, n);
    float* const products = factor + round_up(count * inputs, n);
    std::fill(zeros, factor, 0.0f);
    const float* weight = packed_ + panel * kProducts * inputs * kOutputs;
    int made = -1;
    for (int a = 0; a < 2; ++a) {
      for (int i = 0; i < kPositions; ++i) {
        for (int b = 0; b < 2; ++b) {
          for (int j = 0; j < kPositions; ++j, weight += inputs * kOutputs) {
            const int which = (2 * a + i) * 5 + 2 * b + j;
            if (which != made) make_factor(2 * a + i, 2 * b + j, first, count, zeros, factor);
            made = which;
            matmul<float, false>(count, width, inputs, {factor, inputs, 1}, weight, kOutputs, 0,
                                 products + product(a, i, b, j) * count * width, width);
          }
        }
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      finish(products + t * width, count * width, first + t, panel, width);
    }
  }

 private:
  struct Place {
    int64_t image, row, column;  // of a tile's first input
  };
  Place place(int64_t tile) const {
    return {tile / (rows_ * columns_), tile / columns_ % rows_ * 2, tile % columns_ * 2};
  }

  // Inputs [0, 4) along an axis that factor i takes, and the one that is taken off, or -1.
  static constexpr int plus(int i) { return (i + 1) / 2; }
  static constexpr int minus(int i) { return i % 2 ? -1 : i / 2 + 1; }

  void make_factor(int i, int j, int64_t first, int64_t count, const float* zeros,
                   float* to) const {
    const int rows[2] = {plus(i), minus(i)}, columns[2] = {plus(j), minus(j)};
    const int64_t inputs = shape_.inputs;
    for (int64_t t = 0; t < count; ++t, to += inputs) {
      const Place at = place(first + t);
      const float* from[2][2];
      for (int r = 0; r < 2; ++r) {
        for (int c = 0; c < 2; ++c) {
          const int64_t y = at.row - 1 + rows[r], x = at.column - 1 + columns[c];
          const bool exists = rows[r] >= 0 && columns[c] >= 0 && y >= 0 && y < shape_.height &&
                              x >= 0 && x < shape_.width;
          from[r][c] =
              exists ? x_ + ((at.image * shape_.height + y) * shape_.width + x) * inputs : zeros;
        }
      }
      int64_t c = 0;
      if (rows[1] < 0 && columns[1] < 0) {
        std::copy_n(from[0][0], inputs, to);
      } else if (rows[1] < 0 || columns[1] < 0) {
        const float* const other = rows[1] < 0 ? from[0][1] : from[1][0];
        for (; c + n <= inputs; c += n) store(to + c, load(from[0][0] + c) - load(other + c));
        for (; c < inputs; ++c) to[c] = from[0][0][c] - other[c];
      } else {
        for (; c + n <= inputs; c += n) {
          const FloatVector upper = load(from[0][0] + c) - load(from[0][1] + c);
          store(to + c, upper - (load(from[1][0] + c) - load(from[1][1] + c)));
        }
        for (; c < inputs; ++c) {
          to[c] = (from[0][0][c] - from[0][1][c]) - (from[1][0][c] - from[1][1][c]);
        }
      }
    }
  }

  // The 4 x 4 results of a tile; its products are `next` numbers apart.
  void finish(const float* products, int64_t next, int64_t tile, int64_t panel,
              int64_t width) const {
    const Place at = place(tile);
    const int64_t outputs = shape_.outputs;
    for (int64_t v = 0; v < width; v += n) {
      const int64_t channel = panel * kOutputs + v;
      const int64_t count = std::min<int64_t>(n, outputs - channel);
      alignas(kVectorBytes) float last[n] = {};
      std::copy_n(bias_ + channel, count, last);
      const FloatVector bias = load(last);
      for (int a = 0; a < 2; ++a) {
        for (int b = 0; b < 2; ++b) {
          FloatVector half[2][kPositions];
#pragma GCC unroll 3
          for (int j = 0; j < kPositions; ++j) {
            const auto at_row = [&](int i) {
              return load(products + product(a, i, b, j) * next + v);
            };
            half[0][j] = at_row(0) + at_row(1);
            half[1][j] = at_row(1) - at_row(2);
          }
#pragma GCC unroll 2
          for (int r = 0; r < 2; ++r) {
            const FloatVector results[2] = {half[r][0] + half[r][1] + bias,
                                            half[r][1] - half[r][2] + bias};
#pragma GCC unroll 2
            for (int c = 0; c < 2; ++c) {
              const int64_t row = at.row + r, column = at.column + c;
              if (row >= shape_.height || column >= shape_.width) continue;
              float* const to = out_ + channel +
                                ((at.image * 2 * shape_.height + 2 * row + a) * 2 * shape_.width +
                                 2 * column + b) *
                                    outputs;
              const FloatVector result = maximum(FloatVector{}, results[c]);  // so NaN stays
              if (count == n) {
                store(to, result);
              } else {
                store(last, result);
                std::copy_n(last, count, to);
              }
            }
          }
        }
      }
    }
  }

  const DeconvolutionShape& shape_;
  int64_t rows_, columns_;  // of tiles in an image
  const float *x_, *packed_, *bias_;
  float* out_;
};

}  // namespace

int64_t deconvolution_packed_size(int64_t inputs, int64_t outputs) {
  return Deconvolution::panels(outputs) * kProducts * inputs * kOutputs;
}

// [panel][product][input][output]
void deconvolution_pack(const float* weight, int64_t inputs, int64_t outputs, float* to) {
  std::fill_n(to, deconvolution_packed_size(inputs, outputs), 0.0f);
  for (int64_t o = 0; o < outputs; ++o) {
    float* const panel = to + o / kOutputs * kProducts * inputs * kOutputs + o % kOutputs;
    for (int64_t input = 0; input < inputs; ++input) {
      const float* const taps = weight + (input * outputs + o) * 16;
      for (int a = 0; a < 2; ++a) {
        float half[kPositions][4];
        for (int x = 0; x < 4; ++x) {
          half[0][x] = taps[earlier(a) * 4 + x];
          half[2][x] = taps[later(a) * 4 + x];
          half[1][x] = half[0][x] + half[2][x];
        }
        for (int i = 0; i < kPositions; ++i) {
          for (int b = 0; b < 2; ++b) {
            const float g = half[i][earlier(b)], h = half[i][later(b)];
            const float numbers[kPositions] = {g, g + h, h};
            for (int j = 0; j < kPositions; ++j) {
              panel[(product(a, i, b, j) * inputs + input) * kOutputs] = numbers[j];
            }
          }
        }
      }
    }
  }
}

bool deconvolution_forward(const float* x, const float* packed, const float* bias, float* out,
                           const DeconvolutionShape& shape, int threads) {
  const Deconvolution deconvolution(shape, x, packed, bias, out);
  const int64_t tiles = deconvolution.tiles(), panels = Deconvolution::panels(shape.outputs);
  const int64_t chunks = (tiles + kTiles - 1) / kTiles, units = chunks * panels;
  const int64_t parts = std::min<int64_t>(threads, units);
  const int64_t scratch = deconvolution.scratch_size(std::min(kTiles, tiles));
  auto* const memory =
      static_cast<float*>(thread_scratch(static_cast<size_t>(parts * scratch) * sizeof(float)));
  if (!memory) return false;
  parallel_for(parts, threads, [&](int64_t part) {
    for (int64_t unit = part * units / parts; unit < (part + 1) * units / parts; ++unit) {
      const int64_t chunk = unit / panels;
      const int64_t first = chunk * tiles / chunks, end = (chunk + 1) * tiles / chunks;
      deconvolution.run(first, end - first, unit % panels, memory + part * scratch);
    }
  });
  return true;
}

}  // namespace kernelpose::cpu::KP_ISA
