// N neighbouring elements as one access of global memory; 16 bytes of them is the widest there is.
#pragma once

#include <cuda_runtime.h>

namespace kernelpose {

template <class T, int N>
struct __align__(N * sizeof(T)) ElementVector {
  T values[N];
};

template <class T>
constexpr int kWidestVector = 16 / static_cast<int>(sizeof(T));

template <int N, class T>
__device__ __forceinline__ ElementVector<T, N> load_vector(const T* p) {
  return *reinterpret_cast<const ElementVector<T, N>*>(p);
}

template <class T, int N>
__device__ __forceinline__ void store_vector(T* p, const ElementVector<T, N>& vector) {
  *reinterpret_cast<ElementVector<T, N>*>(p) = vector;
}

}  // namespace kernelpose
