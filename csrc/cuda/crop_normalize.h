// Crops of persons on images, normalised.
//
// `crops` (persons, 3, height, width) is float32, float16 or bfloat16; anything else, or more tiles
// than a grid has blocks, is cudaErrorInvalidValue. Images lie on the device, and so does their
// table. A person without a crop is black. Nothing synchronises or allocates, no input is written,
// and all work is one kernel on `stream` (legal inside a graph capture).
#pragma once

#include <cuda_runtime.h>

#include "kernelpose/crop_normalize.h"
#include "kernelpose/dtype.h"

namespace kernelpose::cuda {

cudaError_t crop_normalize(const ImageSet& images, const Persons& persons, void* crops,
                           const CropShape& shape, DType dtype, cudaStream_t stream);

}  // namespace kernelpose::cuda
