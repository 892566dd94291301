// Kernel launches and dynamic shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

// All shared memory of a kernel, under one name; the emulator has its own.
#ifndef KERNELPOSE_EMULATOR
#define KP_DYNAMIC_SHARED(type, name) extern __shared__ __align__(128) type name[]
#endif

namespace kernelpose {

// An error of the runtime that the caller returns: forgotten here, or the next call of the thread
// that asks for the last error would find it.
inline cudaError_t returned(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// Enqueues kernel<<<grid, block, shared_bytes, stream>>>(args...) on the current device. Neither
// synchronises nor allocates: it may run inside a graph capture.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, A&&... args) {
  if (shared_bytes > 48 * 1024) {  // an attribute of the device: set anew, which costs little
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return returned(error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return returned(cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...));
}

}  // namespace kernelpose
