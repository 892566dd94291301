// The dilated pyramid. x (batch, channels, height, width), out and maps (all layers' channels) are
// dense, in the memory format that the shape says; weights and biases are float32. maps: nullptr
// for the concatenation; for the sum where f_1, ..., f_n go, the last one only if `keep`.
// packed: dilated_pyramid_workspace elements of x's type, 16-byte aligned.
//
// Element types float32, float16, bfloat16; anything else is cudaErrorInvalidValue. Nothing
// synchronises or allocates, and all work is enqueued on `stream` (legal inside a graph capture).
#pragma once

#include <cuda_runtime.h>

#include "kernelpose/dilated_pyramid.h"
#include "kernelpose/dtype.h"

namespace kernelpose::cuda {

// The gradient of a layer before its activation: grad (rows, columns) = grad_out + carry, 0 where
// map <= 0. A row is an image, or a pixel in channels_last; those of carry and grad are dense,
// those of grad_out and map, which may be slices, so many elements apart. carry and map may be
// nullptr.
struct PyramidRows {
  int64_t rows, columns, grad_out_row, map_row;
};

int64_t dilated_pyramid_workspace(const DilatedPyramidLayers& layers,
                                  const DilatedPyramidShape& shape);

cudaError_t dilated_pyramid_forward(const void* x, const DilatedPyramidLayers& layers, void* out,
                                    void* maps, bool keep, void* packed,
                                    const DilatedPyramidShape& shape, DType dtype,
                                    cudaStream_t stream);

cudaError_t dilated_pyramid_mask(const void* grad_out, const void* carry, const void* map,
                                 void* grad, const PyramidRows& rows, DType dtype,
                                 cudaStream_t stream);

}  // namespace kernelpose::cuda
