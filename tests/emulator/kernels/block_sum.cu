// Sum of each block's slice: a tree in shared memory.
#include "kernelpose/launch.cuh"

namespace kernelpose {

__global__ void block_sum_kernel(const float* in, float* out, int64_t count) {
  KP_DYNAMIC_SHARED(float, partial);
  const int64_t i = int64_t{1} * blockIdx.x * blockDim.x + threadIdx.x;
  partial[threadIdx.x] = i < count ? in[i] : 0.0f;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  out[i] = partial[0];
}

}  // namespace kernelpose

// out has an element a thread, so that every thread must see the sum.
extern "C" int block_sum(const float* in, float* out, int64_t count, int threads) {
  const unsigned blocks = unsigned((count + threads - 1) / threads);
  return kernelpose::launch(kernelpose::block_sum_kernel, dim3(blocks), dim3(threads),
                            threads * sizeof(float), nullptr, in, out, count);
}
