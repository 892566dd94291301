// Attention of a map's queries to the keys and values of a smaller map.
#pragma once

#include <cstdint>

namespace kernelpose {

struct ReducedAttentionShape {
  int64_t batch;
  int queries, keys;  // tokens of an image; keys >= 1
  int heads;
  int head_dim;  // 1..128
  double scale;  // kernels that compute in float convert it once, on the host

  int channels() const { return heads * head_dim; }
};

}  // namespace kernelpose
