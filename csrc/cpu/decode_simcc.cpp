// SimCC decoding on the CPU: one task is a few joints. A row is read once, block by block, for its
// maximum; the bin is looked up afterwards, in the first block that holds the maximum, which is
// still in the first cache level.
#include "decode_simcc.h"

#include <algorithm>
#include <limits>

#include "parallel.h"
#include "simd.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

constexpr int kBlock = 128;             // logits
constexpr int64_t kTaskLogits = 32768;  // less is not worth waking a thread for
constexpr float kNever = -std::numeric_limits<float>::infinity();

// The block in float32, padded to kBlock with -infinity.
template <class Element>
inline const float* read_block(const Element* logits, int count, float* room) {
  if constexpr (std::is_same_v<Element, float>) {
    if (count == kBlock) return logits;
  }
  read_row(logits, count, 1.0f, room);
  std::fill(room + count, room + kBlock, kNever);
  return room;
}

// Its largest number, or NaN where it holds one.
inline float block_maximum(const float* block) {
  constexpr int n = kWidth<float>, parts = 4;
  static_assert(kBlock % (parts * n) == 0);
  FloatVector top[parts];
  IntVector unordered{};
  for (auto& t : top) t = broadcast(kNever);
  for (int i = 0; i < kBlock; i += parts * n) {
#pragma GCC unroll 4
    for (int j = 0; j < parts; ++j) {
      const FloatVector v = load(block + i + j * n);
      top[j] = maximum(v, top[j]);
      unordered |= v != v;
    }
  }
  unordered = fold_lanes(
      unordered, [](IntVector a, IntVector b) { return a | b; },
      std::make_integer_sequence<int, n>{});
  if (unordered[0]) return std::numeric_limits<float>::quiet_NaN();
  return reduce_maximum<float>(maximum(maximum(top[0], top[1]), maximum(top[2], top[3])));
}

template <class Element>
SimccPeak peak(const Element* row, int bins) {
  float room[kBlock];
  SimccPeak best{kNever, 0};  // its bin: the first of the block, for now
  for (int i = 0; i < bins; i += kBlock) {
    const float top = block_maximum(read_block(row + i, std::min(kBlock, bins - i), room));
    if (top != top) return {top, 0};
    if (top > best.value) best = {top, i};
  }
  const int count = std::min(kBlock, bins - best.bin);
  const float* block = read_block(row + best.bin, count, room);
  best.bin += static_cast<int>(std::find(block, block + count - 1, best.value) - block);
  return best;
}

template <class Element>
void decode(const Element* x, const Element* y, const float* centers, const float* scales,
            float* points, float* scores, const DecodeSimccShape& shape, int threads) {
  const int64_t joints = std::max<int64_t>(1, kTaskLogits / (shape.bins_x + shape.bins_y));
  parallel_for((shape.rows() + joints - 1) / joints, threads, [&](int64_t task) {
    const int64_t end = std::min(shape.rows(), (task + 1) * joints);
    for (int64_t row = task * joints; row < end; ++row) {
      const int64_t crop = centers ? row / shape.joints * 2 : 0;
      write_simcc_joint(shape, peak(x + row * shape.bins_x, shape.bins_x),
                        peak(y + row * shape.bins_y, shape.bins_y),
                        centers ? centers + crop : nullptr, centers ? scales + crop : nullptr,
                        points + 2 * row, scores + row);
    }
  });
}

}  // namespace

void decode_simcc(const void* x, const void* y, const float* centers, const float* scales,
                  float* points, float* scores, const DecodeSimccShape& shape, DType dtype,
                  int threads) {
  const auto run = [&](auto element) {
    using Element = decltype(element);
    decode(static_cast<const Element*>(x), static_cast<const Element*>(y), centers, scales, points,
           scores, shape, threads);
  };
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat16:
      return run(Half{});
    case DType::kBFloat16:
      return run(BFloat16{});
    case DType::kFloat64:  // eager's alone
      return;
  }
}

}  // namespace kernelpose::cpu::KP_ISA
