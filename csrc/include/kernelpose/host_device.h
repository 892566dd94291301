// Marks functions of these headers that both the host and kernels call.
#pragma once

#if defined(__CUDACC__) || defined(KERNELPOSE_EMULATOR)
#define KP_HOST_DEVICE __host__ __device__
#else
#define KP_HOST_DEVICE
#endif
