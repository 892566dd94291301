// CUDA kernels of heatmap_loss. All tensors are contiguous: pred and grad_pred (maps, height,
// width) in dtype; keypoints (maps, 2), visible (maps), loss and grad_loss (one number) in float.
// Shared memory holds height + width floats. Nothing here synchronises or allocates.
#pragma once

#include <cuda_runtime.h>

#include "kernelpose/dtype.h"
#include "kernelpose/heatmap_loss.h"

namespace kernelpose::cuda {

// Bytes of `sums`.
size_t heatmap_loss_forward_workspace(const HeatmapLossShape& shape);

cudaError_t heatmap_loss_forward(const void* pred, const float* keypoints, const float* visible,
                                 float* loss, float* sums, const HeatmapLossShape& shape,
                                 DType dtype, cudaStream_t stream);

cudaError_t heatmap_loss_backward(const float* grad_loss, const void* pred, const float* keypoints,
                                  const float* visible, void* grad_pred,
                                  const HeatmapLossShape& shape, DType dtype, cudaStream_t stream);

}  // namespace kernelpose::cuda
