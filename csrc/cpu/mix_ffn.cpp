// The feed-forward network of PVT v2. A unit, some images or some rows of one, is computed a block
// of hidden channels after the other: what these take, from the first product to the second, never
// leaves the second level of the cache, and weights are read once a unit. Rows between two units
// are computed for both.
//
// Where there are fewer units than threads, these share a unit: first by blocks, then by tokens,
// for which every block's part is kept. The order of each sum is the same.
#include "mix_ffn.h"

#include <algorithm>

#include "dwconv_gelu_blocks.h"
#include "panel_product.h"
#include "parallel.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

constexpr int64_t kBlock = kMixFfnBlock;
constexpr int64_t kTokens = 768;  // of a unit, about
constexpr int64_t kSharedTokens = 24;

class MixFfn {
 public:
  MixFfn(const MixFfnShape& shape, const float* x, const MixFfnWeights& weights, float* out)
      : shape_(shape), x_(x), weights_(weights), out_(out), tokens_(shape.height * shape.width) {
    images_ = std::clamp<int64_t>(kTokens / tokens_, 1, shape.batch);
    const int64_t strips = (tokens_ + kTokens - 1) / kTokens;
    rows_ = (shape.height + strips - 1) / strips;
    strips_ = (shape.height + rows_ - 1) / rows_;
  }

  int64_t units() const { return (shape_.batch + images_ - 1) / images_ * strips_; }
  int64_t blocks() const { return shape_.hidden / kBlock; }

  // Rows [first, end) of some images, with the rows around, which begin at `top`.
  struct Unit {
    int64_t images, first, end, top, height;  // height of what lies from `top` on
    const float* x;
    float* out;
  };
  Unit unit(int64_t i) const {
    const int64_t image = i / strips_ * images_, first = i % strips_ * rows_;
    const int64_t end = std::min(shape_.height, first + rows_),
                  top = std::max<int64_t>(0, first - 1);
    const int64_t height = std::min(shape_.height, end + 1) - top;
    const int64_t at = image * tokens_, width = shape_.width;
    return {std::min(images_, shape_.batch - image),
            first,
            end,
            top,
            height,
            x_ + (at + top * width) * shape_.inputs,
            out_ + (at + first * width) * shape_.outputs};
  }
  int64_t tokens_out(const Unit& unit) const {
    return unit.images * (unit.end - unit.first) * shape_.width;
  }

  // Numbers of hidden channels in a block: of the largest unit, and of what activates them.
  int64_t block_size() const {
    return images_ * std::min(rows_ + 2, shape_.height) * shape_.width * kBlock;
  }
  int64_t make_size() const { return block_size() + DwconvGelu<float>::scratch({}, kBlock); }

  // GELU(dwconv(fc1)) of a block, in tokens of kBlock channels; the first that counts.
  const float* make(const Unit& unit, int64_t block, float* activated, float* memory) const {
    const int64_t inputs = shape_.inputs, width = shape_.width, channel = block * kBlock;
    const int64_t tokens = unit.images * unit.height * width;
    fill_rows(weights_.fc1_bias + channel, tokens, kBlock, memory, kBlock);
    add_product(tokens, kBlock, inputs, unit.x, inputs, {weights_.fc1, inputs}, 0, channel, memory,
                kBlock);
    const DwconvGeluShape shape{unit.images, unit.height, width, kBlock};
    const DwconvGelu<float> op{shape, memory, weights_.depthwise + channel * kDwconvTaps,
                               weights_.depthwise_bias + channel, activated};
    for (int64_t image = 0; image < unit.images; ++image) {
      op.run(image, {0, kBlock, kBlock}, unit.first - unit.top, unit.end - unit.top,
             memory + block_size());
    }
    return activated + (unit.first - unit.top) * width * kBlock;
  }

  void start(float* out, int64_t tokens) const {
    fill_rows(weights_.fc2_bias, tokens, shape_.outputs, out, shape_.outputs);
  }
  // Adds what a block gives.
  void add(const float* activated, int64_t block, float* out, int64_t tokens) const {
    add_product(tokens, shape_.outputs, kBlock, activated, kBlock, {weights_.fc2, shape_.hidden},
                block * kBlock, 0, out, shape_.outputs);
  }

 private:
  const MixFfnShape& shape_;
  const float* x_;
  const MixFfnWeights& weights_;
  float* out_;
  int64_t tokens_, images_, rows_, strips_;  // tokens of an image; images or rows of a unit
};

}  // namespace

int64_t panel_columns() { return kPanel<float>; }

bool mix_ffn_forward(const float* x, const MixFfnWeights& weights, float* out,
                     const MixFfnShape& shape, int threads) {
  const MixFfn ffn(shape, x, weights, out);
  const int64_t units = ffn.units(), blocks = ffn.blocks();
  const bool share = units < threads;
  const int64_t parts = std::min<int64_t>(threads, share ? blocks : units);
  const int64_t kept = share ? blocks : parts;
  const int64_t size = kept * ffn.block_size() + parts * ffn.make_size();
  auto* const memory =
      static_cast<float*>(thread_scratch(static_cast<size_t>(size) * sizeof(float)));
  if (!memory) return false;
  const auto activated = [&](int64_t i) { return memory + i * ffn.block_size(); };
  const auto own = [&](int64_t part) { return activated(kept) + part * ffn.make_size(); };
  if (!share) {
    parallel_for(parts, threads, [&](int64_t part) {
      for (int64_t i = part * units / parts; i < (part + 1) * units / parts; ++i) {
        const auto unit = ffn.unit(i);
        const int64_t tokens = ffn.tokens_out(unit);
        ffn.start(unit.out, tokens);
        for (int64_t block = 0; block < blocks; ++block) {
          ffn.add(ffn.make(unit, block, activated(part), own(part)), block, unit.out, tokens);
        }
      }
    });
    return true;
  }
  for (int64_t i = 0; i < units; ++i) {
    const auto unit = ffn.unit(i);
    const int64_t tokens = ffn.tokens_out(unit);
    const int64_t first = (unit.first - unit.top) * shape.width;
    parallel_for(parts, threads, [&](int64_t part) {
      for (int64_t b = part * blocks / parts; b < (part + 1) * blocks / parts; ++b) {
        ffn.make(unit, b, activated(b), own(part));
      }
    });
    parallel_for((tokens + kSharedTokens - 1) / kSharedTokens, threads, [&](int64_t task) {
      const int64_t from = task * kSharedTokens, count = std::min(kSharedTokens, tokens - from);
      float* const to = unit.out + from * shape.outputs;
      ffn.start(to, count);
      for (int64_t b = 0; b < blocks; ++b) {
        ffn.add(activated(b) + (first + from) * kMixFfnBlock, b, to, count);
      }
    });
  }
  return true;
}

}  // namespace kernelpose::cpu::KP_ISA
