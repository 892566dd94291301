// What the bindings share. Tensors arrive as addresses, shapes as numbers, a CUDA stream as its
// handle; PyTorch allocates and PyTorch owns. Nothing here knows a torch type, so one build serves
// every torch.
//
// An op's functions are bound in csrc/bindings/<op>.cpp, one or two a device, named
// <device>_<op>..., by a KP_BIND block, which registers itself. Each releases the GIL and raises
// RuntimeError where its kernels could not run. All that the file defines is in a namespace of its
// name: several such files are compiled as one, since pybind11 takes longer than they.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernelpose/dtype.h"

#ifdef KERNELPOSE_WITH_CUDA
#include <cuda_runtime.h>
#endif

namespace kernelpose::bindings {

namespace py = pybind11;

using Address = std::uintptr_t;
using Bind = void (*)(py::module_&);

inline std::vector<Bind>& registered() {
  static std::vector<Bind> all;
  return all;
}

struct Registration {
  explicit Registration(Bind bind) { registered().push_back(bind); }
};

// KP_BIND(module) { module.def(...); } once in a file.
#define KP_BIND(module)                          \
  static void bind(pybind11::module_& module);   \
  static const Registration registration{&bind}; \
  static void bind(pybind11::module_& module)

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline void check_memory(bool ran, const char* op) {
  if (!ran) throw std::runtime_error(std::string(op) + " ran out of memory on the CPU");
}

#ifdef KERNELPOSE_WITH_CUDA
inline cudaStream_t stream_of(Address handle) { return reinterpret_cast<cudaStream_t>(handle); }

inline void check_cuda(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + " failed on the GPU: " + cudaGetErrorString(error));
}
#endif

}  // namespace kernelpose::bindings
