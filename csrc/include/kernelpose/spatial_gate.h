// The gate of SCConv's spatial unit (SRU). With y the group normalisation of x, weight and bias,
// w_c = weight_c / sum of weight, t = w_c y and r = sigmoid(t): where r > threshold, that is
// t > limit, A = x and B = 0; elsewhere A = B = r x. With c' the same channel of the other half of
// the channels, out_c = A_c + B_c'.
//
// Gradient, with g that of out and s_c = g_c + g_c': x itself gets g where t > limit, else r s; t
// gets u = 0 or x s r (1 - r). Of the sums U0 = sum of u and U1 = sum of u (x - mean) rstd over a
// channel's pixels everything else is made: the gradients of weight and bias, and, summed over a
// group with the factors w_c weight_c, what passes through its mean and its deviation.
#pragma once

#include "kernelpose/maps.h"

namespace kernelpose {

struct SpatialGateShape {
  Maps maps;  // an even number of channels
  int64_t groups;
  double limit;  // logarithm of threshold / (1 - threshold)
  double eps;

  KP_HOST_DEVICE int64_t group_channels() const { return maps.channels / groups; }
  KP_HOST_DEVICE int64_t pairs() const { return maps.channels / 2; }
  // From a channel of the first half to the same of the second.
  KP_HOST_DEVICE int64_t to_partner() const {
    return maps.channels_last ? pairs() : pairs() * maps.pixels;
  }
};

}  // namespace kernelpose
