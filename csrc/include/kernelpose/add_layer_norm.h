// sum = x + residual, rounded to the wider type of the two; norm = weight n + bias with
// n = (sum - mean) / d of each row, d = sqrt(variance + eps). The moments of a row are its mean and
// 1 / d.
//
// With g the gradient of norm and h = weight g, that of both x and residual is
// grad_sum + (h - mean of h - n (mean of h n)) / d; that of weight is the sum over rows of g n,
// that of bias of g.
#pragma once

#include <cstdint>

#include "kernelpose/dtype.h"

namespace kernelpose {

struct AddLayerNormShape {
  int64_t rows, channels;
  double eps;
};

// x and its gradient are of type x; residual, sum, norm and their gradients are of type sum, which
// is either the same or float32 beside a 16-bit x; weight and bias are of any type, but float64
// where sum is.
struct AddLayerNormTypes {
  DType x, sum, parameters;
};

}  // namespace kernelpose
