// Attention of groups of channels, one after the other, to a reduced map.
#pragma once

#include <cstdint>

namespace kernelpose {

struct CascadedAttentionShape {
  int64_t batch;
  int height, width;        // of the map, multiples of ratio
  int groups, group_width;  // the map's channels
  int heads;                // a divisor of group_width
  int ratio;                // of the map's sides to the reduced map's
  double eps;               // of all norms

  int channels() const { return groups * group_width; }
  int queries() const { return height * width; }
  int keys() const { return height / ratio * (width / ratio); }
  int head_dim() const { return group_width / heads; }
};

// Of one type; see kernelpose/ops/cascaded_attention.py for their shapes.
struct CascadedAttentionTensors {
  const void *x, *reduce_weight, *reduce_bias, *q_weight, *q_bias, *kv_weight, *kv_bias;
  const void *out_weight, *out_bias, *norm_weight, *norm_bias;
  void* out;
};

}  // namespace kernelpose
