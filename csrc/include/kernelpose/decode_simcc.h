// What decode_simcc computes on, and how the best bins of a joint become its point and score.
#pragma once

#include <cstdint>

#include "kernelpose/host_device.h"

namespace kernelpose {

struct DecodeSimccShape {
  int64_t persons;
  int joints, bins_x, bins_y;
  float split_ratio;
  float span_x, span_y;  // what scales span, in pixels of the input

  KP_HOST_DEVICE int64_t rows() const { return persons * joints; }
};

// The largest logit of a row and its first bin; NaN where the row holds one.
struct SimccPeak {
  float value;
  int bin;
};

// center, scale: (x, y) and (width, height) of the crop, or nullptr for points of the input.
KP_HOST_DEVICE inline void write_simcc_joint(const DecodeSimccShape& shape, SimccPeak x,
                                             SimccPeak y, const float* center, const float* scale,
                                             float* point, float* score) {
  const bool present = x.value > 0 && y.value > 0;
  point[0] = (present ? static_cast<float>(x.bin) : -1.0f) / shape.split_ratio;
  point[1] = (present ? static_cast<float>(y.bin) : -1.0f) / shape.split_ratio;
  if (center != nullptr) {
    point[0] = point[0] * (scale[0] / shape.span_x) + (center[0] - scale[0] / 2);
    point[1] = point[1] * (scale[1] / shape.span_y) + (center[1] - scale[1] / 2);
  }
  const bool numbers = x.value == x.value && y.value == y.value;
  *score = numbers ? (x.value < y.value ? x.value : y.value) : 0.0f;
}

}  // namespace kernelpose
