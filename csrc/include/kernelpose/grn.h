// Global response normalisation of maps x: with g the L2 norm of each channel's pixels and m the
// mean of an image's norms plus eps, out = x (1 + gamma g / m) + beta.
//
// The gradient of x is grad_out (1 + gamma g / m) + x t. With a = gamma s and s the sum over a
// channel's pixels of grad_out x, t = (a / m - sum over channels of (a g) / (m^2 C)) / g; where g
// is 0 so is the gradient of the norm. That of beta is the sum of grad_out, that of gamma s g / m.
#pragma once

#include "kernelpose/maps.h"

namespace kernelpose {

struct GrnShape {
  Maps maps;
  double eps;
};

}  // namespace kernelpose
