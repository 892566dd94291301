// CPU kernels of heatmap_loss. All tensors are contiguous: pred and grad_pred (maps, height, width)
// in dtype; keypoints (maps, 2), visible (maps), loss and grad_loss (one number) in float, or in
// double where pred is. False where there is no memory left.
#pragma once

#include "isa.h"
#include "kernelpose/dtype.h"
#include "kernelpose/heatmap_loss.h"

namespace kernelpose::cpu {

#define KP_DECLARE(isa_namespace)                                                                 \
  namespace isa_namespace {                                                                       \
  bool heatmap_loss_forward(const void* pred, const void* keypoints, const void* visible,         \
                            void* loss, const HeatmapLossShape& shape, DType dtype, int threads); \
  bool heatmap_loss_backward(const void* grad_loss, const void* pred, const void* keypoints,      \
                             const void* visible, void* grad_pred, const HeatmapLossShape& shape, \
                             DType dtype, int threads);                                           \
  }
KP_FOR_EACH_ISA(KP_DECLARE)
#undef KP_DECLARE

}  // namespace kernelpose::cpu
