// The Python module kernelpose._C. Tensors arrive as addresses, shapes as integers, a CUDA stream
// as its handle; PyTorch allocates and PyTorch owns. Nothing here knows a torch type, so one build
// serves every torch.
//
// An op is bound by two functions a device, <device>_<op>_forward and _backward; each releases the
// GIL and raises RuntimeError where its kernels could not run.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/window_attention.h"
#include "kernelpose/dtype.h"
#include "kernelpose/window_attention.h"

#ifdef KERNELPOSE_WITH_CUDA
#include <cuda_runtime.h>

#include "cuda/window_attention.h"
#endif

#ifndef KERNELPOSE_MODULE
#define KERNELPOSE_MODULE _C
#endif
#ifndef KERNELPOSE_CUDA_ARCHS
#define KERNELPOSE_CUDA_ARCHS ""
#endif

namespace py = pybind11;
using namespace kernelpose;

namespace {

using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check_memory(bool ran, const char* op) {
  if (!ran) throw std::runtime_error(std::string(op) + " ran out of memory on the CPU");
}

// (batch, height, width, heads, head_dim, window h, w, shift h, w, grid, pooled, scale)
using WindowAttentionTuple =
    std::tuple<int64_t, int, int, int, int, int, int, int, int, bool, bool, double>;

WindowAttentionShape window_attention_shape(const WindowAttentionTuple& t) {
  const auto& [batch, height, width, heads, head_dim, window_h, window_w, shift_h, shift_w, grid,
               pooled, scale] = t;
  return {batch,
          {height, window_h, shift_h, grid},
          {width, window_w, shift_w, grid},
          heads,
          head_dim,
          pooled,
          scale};
}

void bind_cpu(py::module_& m) {
  using namespace cpu;
  m.def("cpu_window_attention_forward",
        [](Address qkv, Address bias, Address out, Address lse, const WindowAttentionTuple& shape,
           int dtype, int threads) {
          const py::gil_scoped_release release;
          check_memory(KP_SELECT_ISA(window_attention_forward)(
                           pointer(qkv), pointer(bias), pointer(out), pointer(lse),
                           window_attention_shape(shape), static_cast<DType>(dtype), threads),
                       "window_attention");
        });
  m.def("cpu_window_attention_backward",
        [](Address grad_out, Address qkv, Address bias, Address out, Address lse, Address grad_qkv,
           Address grad_bias, const WindowAttentionTuple& shape, int dtype, int threads) {
          const py::gil_scoped_release release;
          check_memory(KP_SELECT_ISA(window_attention_backward)(
                           pointer(grad_out), pointer(qkv), pointer(bias), pointer(out),
                           pointer(lse), pointer(grad_qkv), pointer(grad_bias),
                           window_attention_shape(shape), static_cast<DType>(dtype), threads),
                       "window_attention");
        });
}

#ifdef KERNELPOSE_WITH_CUDA
void check_cuda(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + " failed on the GPU: " + cudaGetErrorString(error));
}

void bind_cuda(py::module_& m) {
  using namespace cuda;
  m.def("cuda_window_attention_forward_workspace",
        [](const WindowAttentionTuple& shape, int dtype) {
          return window_attention_forward_workspace(window_attention_shape(shape),
                                                    static_cast<DType>(dtype));
        });
  m.def("cuda_window_attention_backward_workspace",
        [](const WindowAttentionTuple& shape, int dtype, bool bias_gradient) {
          return window_attention_backward_workspace(window_attention_shape(shape),
                                                     static_cast<DType>(dtype), bias_gradient);
        });
  m.def("cuda_window_attention_forward", [](Address qkv, Address bias, Address out, Address lse,
                                            Address workspace, const WindowAttentionTuple& shape,
                                            int dtype, Address stream) {
    const py::gil_scoped_release release;
    check_cuda(window_attention_forward(pointer(qkv), pointer<float>(bias), pointer(out),
                                        pointer<float>(lse), pointer(workspace),
                                        window_attention_shape(shape), static_cast<DType>(dtype),
                                        reinterpret_cast<cudaStream_t>(stream)),
               "window_attention");
  });
  m.def("cuda_window_attention_backward",
        [](Address grad_out, Address qkv, Address bias, Address out, Address lse, Address grad_qkv,
           Address grad_bias, Address workspace, const WindowAttentionTuple& shape, int dtype,
           Address stream) {
          const py::gil_scoped_release release;
          check_cuda(window_attention_backward(
                         pointer(grad_out), pointer(qkv), pointer<float>(bias), pointer(out),
                         pointer<float>(lse), pointer(grad_qkv), pointer<float>(grad_bias),
                         pointer(workspace), window_attention_shape(shape),
                         static_cast<DType>(dtype), reinterpret_cast<cudaStream_t>(stream)),
                     "window_attention");
        });
}
#endif

}  // namespace

PYBIND11_MODULE(KERNELPOSE_MODULE, m) {
  m.doc() = "kernelpose's native kernels; called through kernelpose.ops.";
  m.def("cpu_isa", [] { return std::string(cpu::isa_name()); });
  m.def("cpu_threads_by", [] { return std::string(cpu::parallel_runtime()); });
  m.attr("cuda_archs") = KERNELPOSE_CUDA_ARCHS;  // "" where no CUDA kernel was built
  m.attr("compiler") = KERNELPOSE_COMPILER;
  bind_cpu(m);
#ifdef KERNELPOSE_WITH_CUDA
  bind_cuda(m);
#endif
}
