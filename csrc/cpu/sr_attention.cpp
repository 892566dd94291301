// Attention with spatially reduced keys and values, all of its layers, some images at a time: first
// the keys and values, a few columns of a product a task; then the queries, a block of tokens a
// task, whose numbers do not leave the second level of the cache from projection to projection.
#include "sr_attention.h"

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "panel_product.h"
#include "parallel.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

constexpr int64_t kImages = 8;    // at a time, or more for more threads
constexpr int64_t kColumns = 64;  // of a task: whole panels
constexpr int64_t kTokens = 96;   // of a task, at most
constexpr int kQueries = 48;      // whose scores are computed together
constexpr int64_t kRowsOfNorm = 8;

class SrAttention {
 public:
  SrAttention(const SrAttentionShape& shape, const SrAttentionWeights& weights, int64_t images,
              float* memory)
      : shape_(shape),
        weights_(weights),
        sizes_(static_cast<int>(shape.keys()), static_cast<int>(shape.channels / shape.heads)) {
    Arena<float> arena(memory);
    reduced_ = arena.take(weights.sr ? images * shape.keys() * shape.channels : 0);
    kv_ = arena.take(images * shape.keys() * 2 * shape.channels);
    key_panels_ = arena.take(images * shape.heads * panels_size(sizes_));
    values_ = arena.take(images * shape.heads * head_values());
    size_ = arena.used();
  }

  int64_t size() const { return size_; }
  // Of a task.
  int64_t scratch_size(int64_t tokens) const {
    return std::max(tokens * shape_.channels + kQueries * sizes_.keys_pad,
                    shape_.keys() * sizes_.dim_pad);
  }

  // Columns of the patches' projection.
  void reduce(const float* x, int64_t image, int64_t column) const {
    const int64_t channels = shape_.channels, ratio = shape_.ratio;
    const int64_t count = std::min(kColumns, channels - column), patches = shape_.width / ratio;
    float* const to = reduced_ + image * shape_.keys() * channels + column;
    fill_rows(weights_.sr_bias + column, shape_.keys(), count, to, channels);
    const PackedMatrix weight{weights_.sr, ratio * ratio * channels};
    // The rows of a weight's panel that stay in the first level meet all patches.
    constexpr int64_t kDepth = 128;
    for (int64_t k = 0; k < weight.inputs;) {
      const int64_t y = k / (ratio * channels), rest = k % (ratio * channels);
      const int64_t depth = std::min(kDepth, ratio * channels - rest);
      for (int64_t row = 0; row < shape_.height / ratio; ++row) {
        const float* const from =
            x + (image * shape_.tokens() + (row * ratio + y) * shape_.width) * channels + rest;
        add_product(patches, count, depth, from, ratio * channels, weight, k, column,
                    to + row * patches * channels, channels);
      }
      k += depth;
    }
  }

  // LayerNorm of reduced rows [first, first + count), in place.
  void normalise(int64_t first, int64_t count) const {
    constexpr int n = kWidth<float>;
    const int64_t channels = shape_.channels;
    for (float* row = reduced_ + first * channels; count > 0; --count, row += channels) {
      FloatVector sum = {}, squares = {};
      for (int64_t c = 0; c < channels; c += n) sum += load(row + c);
      const float mean = reduce_sum<float>(sum) / static_cast<float>(channels);
      for (int64_t c = 0; c < channels; c += n) {
        const FloatVector d = load(row + c) - mean;
        squares += d * d;
      }
      const float variance = reduce_sum<float>(squares) / static_cast<float>(channels);
      const float inverse = 1.0f / std::sqrt(variance + shape_.eps);
      for (int64_t c = 0; c < channels; c += n) {
        store(row + c, (load(row + c) - mean) * inverse * load(weights_.norm + c) +
                           load(weights_.norm_bias + c));
      }
    }
  }

  // Columns of keys and values, of an image's reduced tokens or of its own.
  void project(const float* x, int64_t image, int64_t column) const {
    const int64_t channels = shape_.channels, keys = shape_.keys();
    const int64_t count = std::min(kColumns, 2 * channels - column);
    const float* const from = (weights_.sr ? reduced_ : x) + image * keys * channels;
    float* const to = kv_ + image * keys * 2 * channels + column;
    fill_rows(weights_.kv_bias + column, keys, count, to, 2 * channels);
    add_product(keys, count, channels, from, channels, {weights_.kv, channels}, 0, column, to,
                2 * channels);
  }

  // A head's keys, scaled, and its values as products read them.
  void arrange(int64_t image, int64_t head, float* memory) const {
    const int64_t channels = shape_.channels, keys = shape_.keys();
    const float factor =
        static_cast<float>(kLog2E / std::sqrt(static_cast<double>(sizes_.head_dim)));
    const float* from = kv_ + image * keys * 2 * channels + head * sizes_.head_dim;
    float* value = values_ + (image * shape_.heads + head) * head_values();
    for (int64_t key = 0; key < keys; ++key, from += 2 * channels, value += sizes_.dim_pad) {
      gather_row(from, factor, sizes_, memory + key * sizes_.dim_pad);
      std::copy_n(from + channels, sizes_.dim_pad, value);
    }
    transpose_to_panels(memory, sizes_,
                        key_panels_ + (image * shape_.heads + head) * panels_size(sizes_));
  }

  // `count` tokens of an image, from x to out.
  void attend(const float* x, float* out, int64_t image, int64_t count, float* memory) const {
    const int64_t channels = shape_.channels;
    float* const tokens = memory;  // queries, and then results in their places
    float* const scores = memory + count * channels;
    fill_rows(weights_.q_bias, count, channels, tokens, channels);
    add_product(count, channels, channels, x, channels, {weights_.q, channels}, 0, 0, tokens,
                channels);
    for (int64_t head = 0; head < shape_.heads; ++head) {
      const int64_t which = image * shape_.heads + head;
      for (int64_t first = 0; first < count; first += kQueries) {
        float* const own = tokens + first * channels + head * sizes_.head_dim;
        const int queries = static_cast<int>(std::min<int64_t>(kQueries, count - first));
        float largest[kQueries], sums[kQueries];
        softmax_weights(queries, sizes_, {own, channels, 1},
                        key_panels_ + which * panels_size(sizes_), scores, largest, sums);
        matmul<float, false>(queries, sizes_.dim_pad, sizes_.keys, {scores, sizes_.keys_pad, 1},
                             values_ + which * head_values(), sizes_.dim_pad, kPanel<float>, own,
                             channels);
      }
    }
    fill_rows(weights_.proj_bias, count, channels, out, channels);
    add_product(count, channels, channels, tokens, channels, {weights_.proj, channels}, 0, 0, out,
                channels);
  }

 private:
  int64_t head_values() const { return shape_.keys() * sizes_.dim_pad; }

  const SrAttentionShape& shape_;
  const SrAttentionWeights& weights_;
  const AttentionSizes<float> sizes_;
  float *reduced_, *kv_, *key_panels_, *values_;  // of each image
  int64_t size_;
};

}  // namespace

bool sr_attention_forward(const float* x, const SrAttentionWeights& weights, float* out,
                          const SrAttentionShape& shape, int threads) {
  const int64_t most = std::min(shape.batch, std::max<int64_t>(kImages, threads));
  const int64_t image_size = shape.tokens() * shape.channels;
  // A task's tokens: fewer where threads would have none. Each token is computed alone.
  const int64_t each = (most * shape.tokens() + threads - 1) / threads;
  const int64_t tokens = std::min({round_up(each, 6), kTokens, shape.tokens()});
  const int64_t size = SrAttention(shape, weights, most, nullptr).size();
  const int64_t scratch = SrAttention(shape, weights, most, nullptr).scratch_size(tokens);
  auto* const memory = static_cast<float*>(
      thread_scratch(static_cast<size_t>(size + threads * scratch) * sizeof(float)));
  if (!memory) return false;
  const SrAttention attention(shape, weights, most, memory);
  // task(i, memory of its own) for i in [0, tasks)
  const auto run = [&](int64_t tasks, const auto& task) {
    const int64_t parts = std::min<int64_t>(threads, tasks);
    parallel_for(parts, threads, [&](int64_t part) {
      for (int64_t i = part * tasks / parts; i < (part + 1) * tasks / parts; ++i) {
        task(i, memory + size + part * scratch);
      }
    });
  };
  const auto columns = [](int64_t channels) { return (channels + kColumns - 1) / kColumns; };
  for (int64_t first = 0; first < shape.batch; first += most) {
    const int64_t images = std::min(most, shape.batch - first), rows = images * shape.keys();
    const float* const from = x + first * image_size;
    float* const to = out + first * image_size;
    if (weights.sr) {
      run(images * columns(shape.channels),
          [&](int64_t i, float*) { attention.reduce(from, i % images, i / images * kColumns); });
      run((rows + kRowsOfNorm - 1) / kRowsOfNorm, [&](int64_t i, float*) {
        attention.normalise(i * kRowsOfNorm, std::min(kRowsOfNorm, rows - i * kRowsOfNorm));
      });
    }
    run(images * columns(2 * shape.channels),
        [&](int64_t i, float*) { attention.project(from, i % images, i / images * kColumns); });
    run(images * shape.heads,
        [&](int64_t i, float* own) { attention.arrange(i / shape.heads, i % shape.heads, own); });
    const int64_t blocks = (shape.tokens() + tokens - 1) / tokens;
    run(images * blocks, [&](int64_t i, float* own) {
      const int64_t image = i / blocks, token = i % blocks * tokens;
      const int64_t at = image * image_size + token * shape.channels;
      attention.attend(from + at, to + at, image, std::min(tokens, shape.tokens() - token), own);
    });
  }
  return true;
}

}  // namespace kernelpose::cpu::KP_ISA
