// Sum of a row by one block: shuffles inside each warp, shared memory between warps.
#include "kernelpose/launch.cuh"

namespace kernelpose {

__global__ void warp_sum_kernel(const float* in, float* out, int columns) {
  KP_DYNAMIC_SHARED(float, warp_sum);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int row = blockIdx.x; row < int(2 * gridDim.x); row += gridDim.x) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < columns; i += blockDim.x)
      sum += in[int64_t{1} * row * columns + i];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) warp_sum[warp] = sum;
    __syncthreads();
    sum = lane < warps ? warp_sum[lane] : 0.0f;
    for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
    sum = __shfl_sync(0xffffffffu, sum, 0);
    if (threadIdx.x == 0) out[row] = sum;
    __syncthreads();
  }
}

}  // namespace kernelpose

// Two rows a block.
extern "C" int warp_sum(const float* in, float* out, int rows, int columns, int threads) {
  return kernelpose::launch(kernelpose::warp_sum_kernel, dim3(rows / 2), dim3(threads),
                            threads / 32 * sizeof(float), nullptr, in, out, columns);
}
