// Conversions of cuda_fp16.h and cuda_bf16.h.
#include "kernelpose/launch.cuh"
#include "kernelpose/ptx.cuh"

namespace kernelpose {

template <class T>
__global__ void convert_kernel(const float* in, T* narrow, float* wide, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  narrow[i] = T(in[i]);
  wide[i] = float(narrow[i]);
}

template <class T>
int convert(const float* in, void* narrow, float* wide, int count) {
  return launch(convert_kernel<T>, dim3((count + 255) / 256), dim3(256), 0, nullptr, in,
                static_cast<T*>(narrow), wide, count);
}

}  // namespace kernelpose

extern "C" int convert_half(const float* in, void* narrow, float* wide, int count) {
  return kernelpose::convert<__half>(in, narrow, wide, count);
}

extern "C" int convert_bfloat16(const float* in, void* narrow, float* wide, int count) {
  return kernelpose::convert<__nv_bfloat16>(in, narrow, wide, count);
}
