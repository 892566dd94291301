// A map stays in the L1 cache for all its steps: its arg-max, the blur of the few pixels around the
// peak that the refinement reads, and the maximum of the whole blur in the rare case that it
// counts.
#include "decode_heatmap.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "parallel.h"
#include "simd.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

constexpr int64_t kTaskPixels = 16384;  // fewer are not worth waking a thread for
constexpr int kLanes = kWidth<float>;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Peak {
  float value;  // NaN where the map holds one
  int index;    // of the first pixel with that value
};

Peak find_peak(const float* map, int count) {
  constexpr int kChains = 4;  // of dependent comparisons
  FloatVector top[kChains];
  IntVector unordered[kChains] = {};
  for (auto& t : top) t = broadcast(-kInfinity);
  int i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const FloatVector values = load(map + i + c * kLanes);
      unordered[c] |= values != values;
      top[c] = maximum(values, top[c]);
    }
  }
  const FloatVector both = maximum(maximum(top[0], top[1]), maximum(top[2], top[3]));
  const IntVector any = unordered[0] | unordered[1] | unordered[2] | unordered[3];
  float value = reduce_maximum<float>(both);
  bool has_nan = false;
  for (int lane = 0; lane < kLanes; ++lane) has_nan |= any[lane] != 0;
  for (; i < count; ++i) {
    has_nan |= map[i] != map[i];
    if (map[i] > value) value = map[i];
  }
  if (has_nan) return {std::numeric_limits<float>::quiet_NaN(), 0};

  constexpr int kBlock = 64;
  int first = 0;
  for (; first + kBlock <= count; first += kBlock) {
    int here = 0;
    for (int j = 0; j < kBlock; ++j) here |= map[first + j] == value;
    if (here) break;
  }
  while (map[first] != value) ++first;
  return {value, first};
}

// sum += weights[k] * from[k * step ...] for all taps, N vectors side by side.
template <int N>
inline void add_taps(const float* from, int64_t step, const float* weights, int taps,
                     FloatVector (&sum)[N]) {
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) sum[n] = load(from + n * kLanes) * weights[0];
  for (int k = 1; k < taps; ++k) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[n] += load(from + k * step + n * kLanes) * weights[k];
  }
}

// Calls each(x, vector) for all vectors of a row of sums of taps.
template <class Each>
inline void sum_row(const float* from, int64_t step, const float* weights, int taps, int64_t length,
                    const Each& each) {
  constexpr int kBlock = 3;  // 48 pixels of AVX-512
  int64_t x = 0;
  for (; x + kBlock * kLanes <= length; x += kBlock * kLanes) {
    FloatVector sums[kBlock];
    add_taps(from + x, step, weights, taps, sums);
#pragma GCC unroll 4
    for (int n = 0; n < kBlock; ++n) each(x + n * kLanes, sums[n]);
  }
  for (; x < length; x += kLanes) {
    FloatVector sums[1];
    add_taps(from + x, step, weights, taps, sums);
    each(x, sums[0]);
  }
}

// Memory of one task, in numbers of float32.
struct Scratch {
  int64_t row, padded_row;  // a row of blurred pixels; one of the map between zeros
  int64_t map, padded, rows, size;

  Scratch(const DecodeHeatmap& problem, bool converts)
      : row(round_up(problem.width, kLanes)),
        padded_row(round_up(row + 2 * problem.radius(), kLanes)),
        map(0),
        padded(converts ? round_up(problem.pixels(), kLanes) : 0),
        rows(padded + (problem.rescales() ? problem.height * padded_row : 0)),
        size(rows + (problem.rescales() ? problem.height * row : 0)) {}
};

// The largest value of the blurred map, with zeros around the map.
float blurred_maximum(const float* map, const DecodeHeatmap& problem, const Scratch& scratch,
                      float* memory) {
  const int width = problem.width, height = problem.height, radius = problem.radius();
  float* padded = memory + scratch.padded;
  for (int y = 0; y < height; ++y) {
    float* line = padded + y * scratch.padded_row;
    for (int x = 0; x < radius; ++x) line[x] = 0;
    std::memcpy(line + radius, map + int64_t{y} * width, sizeof(float) * width);
    for (int64_t x = radius + width; x < scratch.padded_row; ++x) line[x] = 0;
  }
  float* rows = memory + scratch.rows;
  for (int y = 0; y < height; ++y) {
    float* row = rows + y * scratch.row;
    sum_row(padded + y * scratch.padded_row, 1, problem.weights, problem.taps, scratch.row,
            [&](int64_t x, FloatVector sums) { store(row + x, sums); });
    for (int64_t x = width; x < scratch.row; ++x) row[x] = -kInfinity;  // no pixels
  }
  FloatVector top = broadcast(-kInfinity);
  for (int y = 0; y < height; ++y) {
    const int first = y < radius ? radius - y : 0;
    const int end = height - y <= radius ? radius + height - y : problem.taps;
    sum_row(rows + (y - radius + first) * scratch.row, scratch.row, problem.weights + first,
            end - first, scratch.row, [&](int64_t, FloatVector sums) { top = maximum(sums, top); });
  }
  return reduce_maximum<float>(top);
}

// The blurred map around the peak at x, y, edges repeated: near[dy + 2][dx + 2].
void blur_near(const float* map, const DecodeHeatmap& problem, int x, int y,
               float (&near)[kNear][kNear]) {
  const int reach = problem.reach(), radius = problem.radius(), taps = problem.taps;
  const Window window = problem.around(x, y);
  float rows[kMaxTaps + kNear - 1][kNear];  // blurred along x, radius more on either side
  int columns[kMaxTaps + kNear - 1];        // of the map, radius more on either side
  for (int i = 0; i < window.width + taps - 1; ++i) {
    columns[i] = problem.source(window.left - radius + i, problem.width);
  }
  for (int i = 0; i < window.height + taps - 1; ++i) {
    const int from = problem.source(window.top - radius + i, problem.height);
    const float* line = map + int64_t{from} * problem.width;
    float values[kMaxTaps + kNear - 1];
    for (int j = 0; j < window.width + taps - 1; ++j) {
      values[j] = from < 0 || columns[j] < 0 ? 0.0f : line[columns[j]];
    }
    for (int column = 0; column < window.width; ++column) {
      float sum = values[column] * problem.weights[0];
      for (int k = 1; k < taps; ++k) sum += values[column + k] * problem.weights[k];
      rows[i][column] = sum;
    }
  }
  for (int dy = -reach; dy <= reach; ++dy) {
    for (int dx = -reach; dx <= reach; ++dx) {
      const int row = clamped(y + dy, problem.height) - window.top;
      const int column = clamped(x + dx, problem.width) - window.left;
      float sum = rows[row][column] * problem.weights[0];
      for (int k = 1; k < taps; ++k) sum += rows[row + k][column] * problem.weights[k];
      near[dy + 2][dx + 2] = sum;
    }
  }
}

// What the blur is multiplied with.
float rescaling(const float* map, const DecodeHeatmap& problem, float peak,
                const float (&near)[kNear][kNear], const Scratch& scratch, float* memory) {
  const int reach = problem.reach();
  const float factor = peak / near[2][2];
  bool enough = true;
  for (int dy = -reach; dy <= reach; ++dy) {
    for (int dx = -reach; dx <= reach; ++dx) {
      enough &= problem.never_clipped(near[dy + 2][dx + 2], factor);
    }
  }
  return enough ? factor : peak / blurred_maximum(map, problem, scratch, memory);
}

Point locate(const float* map, const DecodeHeatmap& problem, const Peak& peak,
             const Scratch& scratch, float* memory) {
  const int x = peak.index % problem.width, y = peak.index / problem.width;
  Point step;
  if (problem.blurs()) {
    float near[kNear][kNear];
    blur_near(map, problem, x, y, near);
    const int reach = problem.reach();
    const float factor =
        problem.rescales() ? rescaling(map, problem, peak.value, near, scratch, memory) : 1.0f;
    for (int dy = -reach; dy <= reach; ++dy) {
      for (int dx = -reach; dx <= reach; ++dx) {
        float& value = near[dy + 2][dx + 2];
        value = std::log(problem.clipped(value * factor));
      }
    }
    step = refinement(problem, x, y, [&](int dx, int dy) { return near[dy + 2][dx + 2]; });
  } else {
    step = refinement(problem, x, y, [&](int dx, int dy) {
      return map[int64_t{clamped(y + dy, problem.height)} * problem.width +
                 clamped(x + dx, problem.width)];
    });
  }
  return {static_cast<float>(x) + step.x, static_cast<float>(y) + step.y};
}

// The map in float32: itself, or converted.
inline const float* read_map(const float* from, int, float*) { return from; }
inline const float* read_map(const double* from, int count, float* to) {
  for (int i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
  return to;
}
template <class Element>
inline const float* read_map(const Element* from, int count, float* to) {
  read_row(from, count, 1.0f, to);
  return to;
}

template <class Element>
bool decode(const Element* heatmaps, const DecodedPoints& out, const DecodeHeatmap& problem,
            int threads) {
  const Scratch scratch(problem, !std::is_same_v<Element, float>);
  std::atomic<bool> enough_memory{true};
  const int64_t some = std::max<int64_t>(1, kTaskPixels / problem.pixels());
  parallel_for((problem.maps() + some - 1) / some, threads, [&](int64_t task) {
    float* memory = static_cast<float*>(thread_scratch(sizeof(float) * scratch.size));
    if (!memory && scratch.size) {
      enough_memory = false;
      return;
    }
    for (int64_t i = task * some; i < std::min(problem.maps(), (task + 1) * some); ++i) {
      const float* map =
          read_map(heatmaps + i * problem.pixels(), problem.pixels(), memory + scratch.map);
      const Peak peak = find_peak(map, problem.pixels());
      Point location = {};
      if (is_peak(peak.value)) location = locate(map, problem, peak, scratch, memory);
      out.write(problem, i, peak.value, location);
    }
  });
  return enough_memory;
}

}  // namespace

bool decode_heatmap(const void* heatmaps, const DecodedPoints& out, const DecodeHeatmap& problem,
                    DType dtype, int threads) {
  switch (dtype) {
    case DType::kFloat32:
      return decode(static_cast<const float*>(heatmaps), out, problem, threads);
    case DType::kFloat16:
      return decode(static_cast<const Half*>(heatmaps), out, problem, threads);
    case DType::kBFloat16:
      return decode(static_cast<const BFloat16*>(heatmaps), out, problem, threads);
    case DType::kFloat64:
      return decode(static_cast<const double*>(heatmaps), out, problem, threads);
  }
  return false;
}

}  // namespace kernelpose::cpu::KP_ISA
