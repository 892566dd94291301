// The tail of CRU (SCConv, CVPR 2023): with m1, m2 the means over the pixels of each channel of y1
// and y2, and w1, w2 their softmax, over all channels of both or, pairwise, over the two of a
// channel, out = w1 y1 + w2 y2.
//
// The gradient of yi is wi grad_out + wi (di - t) / pixels, where di is the sum over a channel's
// pixels of grad_out yi, and t the sum of w d over what the softmax goes over.
#pragma once

#include "kernelpose/maps.h"

namespace kernelpose {

struct ChannelFuseShape {
  Maps maps;
  bool pairwise;
};

}  // namespace kernelpose
