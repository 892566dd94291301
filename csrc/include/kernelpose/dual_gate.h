// The sum of two gates on maps y: out = (a + s) y.
//
// The gate of a channel is a = sigmoid(W2 (relu(h0) + relu(h1))), where h0 = W1 m and h1 = W1 M,
// and m and M are the mean and the largest of each channel's pixels. That of a pixel is s =
// sigmoid(correlation of a 7x7 kernel with the maps of mean and largest of each pixel's channels).
//
// Where several values are the largest they share its gradient evenly.
#pragma once

#include "kernelpose/maps.h"

namespace kernelpose {

constexpr int kGateKernel = 7;  // side of the spatial gate's kernel
constexpr int kGateMargin = kGateKernel / 2;
constexpr int kGateWeights = 2 * kGateKernel * kGateKernel;

struct DualGateShape {
  Maps maps;
  int64_t width, hidden;

  KP_HOST_DEVICE int64_t height() const { return maps.pixels / width; }
  // Numbers of an image that the forward pass leaves for the backward pass: mean, largest, gate of
  // the channels; the same of the pixels; h0 and h1.
  KP_HOST_DEVICE int64_t state() const { return 3 * maps.channels + 3 * maps.pixels + 2 * hidden; }
  // An image's part of the parameters' gradients, which are sums and products of them: of the
  // arguments of the channels' sigmoids, of h0 and h1, of the spatial kernel.
  KP_HOST_DEVICE int64_t partial() const { return maps.channels + 2 * hidden + kGateWeights; }
};

}  // namespace kernelpose
