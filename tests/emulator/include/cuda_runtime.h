// Stand-in for CUDA's header of the same name: what the kernels of csrc/cuda use, no more.
//
// __shared__ is missing on purpose: KP_DYNAMIC_SHARED is poisoned and guarded, a static variable
// would not be. <<<>>> is missing too: kernelpose::launch checks what it is given.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <tuple>
#include <utility>

#include "emulator.h"

// Dynamic shared memory of the block: 16-byte aligned, and no more than that.
#define KP_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(kernelpose::emulator::dynamic_shared())

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

// Types ------------------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define KP_VECTORS(type, name)                                                                  \
  struct __align__(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct name##3 { type x, y, z; };                                                             \
  struct __align__(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                              \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                   \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

struct __align__(8) uint2 {
  unsigned x, y;
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
KP_VECTORS(int, int)
KP_VECTORS(float, float)
KP_VECTORS(double, double)
KP_VECTORS(unsigned char, uchar)
#undef KP_VECTORS

// Host side --------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
};
using cudaStream_t = void*;

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
  }
  return "unrecognized error code";
}
inline const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
// What a call that is refused leaves behind, besides returning it, until somebody asks.
inline thread_local cudaError_t kp_last_error = cudaSuccess;
inline cudaError_t kp_refuse(cudaError_t error) {
  if (error != cudaSuccess) kp_last_error = error;
  return error;
}
inline cudaError_t cudaGetLastError() { return std::exchange(kp_last_error, cudaSuccess); }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return *value = 4, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *value = 9, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = 0, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = kernelpose::emulator::shared_limit(), cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
// Dynamic shared memory that a kernel may be launched with.
inline int& kp_shared_bytes(const void* kernel) {
  static std::map<const void*, int> bytes;
  return bytes.try_emplace(kernel, 48 * 1024).first->second;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > kernelpose::emulator::shared_limit()) return kp_refuse(cudaErrorInvalidValue);
  kp_shared_bytes(reinterpret_cast<const void*>(kernel)) = bytes;
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// Runs the whole grid before it returns; every thread gets its own copy of the parameters.
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... args) {
  static_assert((sizeof(P) + ... + 0) <= 4096, "kernel parameters are limited to 4 KB");
  if (config->dynamicSmemBytes > size_t(kp_shared_bytes(reinterpret_cast<const void*>(kernel)))) {
    return kp_refuse(cudaErrorInvalidValue);
  }
  using Call = std::pair<void (*)(P...), std::tuple<P...>>;
  Call call{kernel, std::tuple<P...>(std::forward<A>(args)...)};
  const auto thread = [](void* argument) {
    const Call& c = *static_cast<const Call*>(argument);
    std::apply(c.first, c.second);
  };
  const dim3 grid = config->gridDim, block = config->blockDim;
  return kp_refuse(cudaError_t(
      kernelpose::emulator::run_grid({grid.x, grid.y, grid.z}, {block.x, block.y, block.z},
                                     config->dynamicSmemBytes, thread, &call)));
}
inline cudaError_t cudaMemsetAsync(void* device, int value, size_t bytes, cudaStream_t = nullptr) {
  return memset(device, value, bytes), cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

// Device side: meeting points --------------------------------------------------------------------

inline void __syncthreads(KP_SITE_PARAMETERS) { kernelpose::emulator::sync_threads({file, line}); }
inline int __syncthreads_count(int predicate, KP_SITE_PARAMETERS) {
  return kernelpose::emulator::sync_threads_count(predicate != 0, {file, line});
}
inline int __syncthreads_or(int predicate, KP_SITE_PARAMETERS) {
  return kernelpose::emulator::sync_threads_count(predicate != 0, {file, line}) != 0;
}
inline int __syncthreads_and(int predicate, KP_SITE_PARAMETERS) {
  return kernelpose::emulator::sync_threads_count(predicate == 0, {file, line}) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, KP_SITE_PARAMETERS) {
  kernelpose::emulator::sync_warp(mask, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, KP_SITE_PARAMETERS) {
  return kernelpose::emulator::ballot(mask, predicate != 0, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, KP_SITE_PARAMETERS) {
  return kernelpose::emulator::ballot(mask, predicate != 0, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, KP_SITE_PARAMETERS) {
  return kernelpose::emulator::ballot(mask, predicate == 0, {file, line}) == 0;
}

namespace kernelpose::emulator {
template <class T>
T shuffle_value(unsigned mask, T value, int source_lane, Site site) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, source_lane, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace kernelpose::emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, KP_SITE_PARAMETERS) {
  const int first = kernelpose::emulator::lane() & ~(width - 1);
  return kernelpose::emulator::shuffle_value(mask, value, first | (source & (width - 1)),
                                             {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, KP_SITE_PARAMETERS) {
  const int lane = kernelpose::emulator::lane(), source = lane - int(delta);
  return kernelpose::emulator::shuffle_value(
      mask, value, source < (lane & ~(width - 1)) ? lane : source, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, KP_SITE_PARAMETERS) {
  const int lane = kernelpose::emulator::lane(), source = lane + int(delta);
  return kernelpose::emulator::shuffle_value(
      mask, value, source > (lane | (width - 1)) ? lane : source, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, KP_SITE_PARAMETERS) {
  const int lane = kernelpose::emulator::lane(), source = lane ^ lane_mask;
  return kernelpose::emulator::shuffle_value(
      mask, value, source > (lane | (width - 1)) ? lane : source, {file, line});
}

// Device side: arithmetic ------------------------------------------------------------------------

template <class To, class From>
To kp_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
inline int __float_as_int(float x) { return kp_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return kp_bits<unsigned>(x); }
inline float __int_as_float(int x) { return kp_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return kp_bits<float>(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __expf(float x) { return expf(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
// Threads change over at meeting points alone, so a plain addition is atomic.
template <class T>
__attribute__((no_sanitize("address"))) T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
