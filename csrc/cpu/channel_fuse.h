// CPU kernels of channel_fuse. y1, y2, out and their gradients are dense, in the memory format that
// shape.maps says; means and products (batch, 2, channels), over the pixels of y1, y2 and of
// grad_out times each, are of the compute type. See kernelpose/ops/channel_fuse.py.
#pragma once

#include "isa.h"
#include "kernelpose/channel_fuse.h"
#include "kernelpose/dtype.h"

namespace kernelpose::cpu {

#define KP_DECLARE(isa_namespace)                                                             \
  namespace isa_namespace {                                                                   \
  void channel_fuse_forward(const void* y1, const void* y2, void* out, void* means,           \
                            const ChannelFuseShape& shape, DType dtype, int threads);         \
  void channel_fuse_backward(const void* grad_out, const void* y1, const void* y2,            \
                             const void* means, void* products, void* grad_y1, void* grad_y2, \
                             const ChannelFuseShape& shape, DType dtype, int threads);        \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
