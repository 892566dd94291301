// Two 1x1 convolutions around a wider map, and what lies between; no gradient.
//
//   x, out              as kernelpose/inverted_bottleneck.h has them
//   expand              (hidden, inputs)
//   depthwise           (hidden, 9), or nullptr: no depthwise convolution and no act2
//   project             (outputs, hidden)
//
// and of each a bias. Element types float32, float16, bfloat16, all the same; any alignment. Fewer
// than 2^30 pixels of an image, and 2^31 blocks: anything else is cudaErrorInvalidValue. One
// launch, which neither synchronises nor allocates, writes no input and gives the same bits on
// every run (legal inside a graph capture).
#pragma once

#include <cuda_runtime.h>

#include "kernelpose/dtype.h"
#include "kernelpose/inverted_bottleneck.h"

namespace kernelpose::cuda {

struct InvertedBottleneckTensors {
  const void *x, *expand, *expand_bias, *depthwise, *depthwise_bias, *project, *project_bias;
  void* out;
};

cudaError_t inverted_bottleneck(const InvertedBottleneckTensors& tensors,
                                const InvertedBottleneckShape& shape, DType dtype,
                                cudaStream_t stream);

}  // namespace kernelpose::cuda
