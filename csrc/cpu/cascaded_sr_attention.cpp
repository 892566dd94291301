// The attention of HEViTPose with its last projection.
#include "cascaded_sr_attention.h"

#include <algorithm>

#include "cascaded_attention.h"
#include "packed_product.h"
#include "parallel.h"

namespace kernelpose::cpu::KP_ISA {

bool cascaded_sr_attention_forward(const CascadedAttentionTensors& tensors,
                                   const CascadedAttentionShape& shape, const float* packed,
                                   const float* residual, float* out, int threads) {
  if (!cascaded_attention_forward(tensors, shape, DType::kFloat32, threads)) return false;
  constexpr int64_t kTogether = 16 * kProductPixels;  // pixels that a panel is read for
  const int64_t channels = shape.channels(), pixels = shape.batch * shape.queries();
  const float* const bias = packed + channels * channels;
  parallel_for((pixels + kTogether - 1) / kTogether, threads, [&](int64_t i) {
    const int64_t first = i * kTogether, count = std::min(kTogether, pixels - first);
    const float* const found = static_cast<const float*>(tensors.out) + first * channels;
    packed_product(found, channels, count, channels, channels, packed, bias,
                   [&](int64_t pixel, int64_t output, FloatVector sum) {
                     const int64_t at = (first + pixel) * channels + output;
                     store(out + at, residual ? load(residual + at) + sum : sum);
                   });
  });
  return true;
}

}  // namespace kernelpose::cpu::KP_ISA
