// The Python module kernelpose._C: facts about the build, and the functions of every op
// (csrc/bindings/<op>.cpp).
#include <string>

#include "bindings/bind.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

#ifndef KERNELPOSE_MODULE
#define KERNELPOSE_MODULE _C
#endif
#ifndef KERNELPOSE_CUDA_ARCHS
#define KERNELPOSE_CUDA_ARCHS ""
#endif

PYBIND11_MODULE(KERNELPOSE_MODULE, m) {
  using namespace kernelpose;
  m.doc() = "kernelpose's native kernels; called through kernelpose.ops.";
  m.def("cpu_isa", [] { return std::string(cpu::isa_name()); });
  m.def("cpu_threads_by", [] { return std::string(cpu::parallel_runtime()); });
  m.attr("cuda_archs") = KERNELPOSE_CUDA_ARCHS;  // "" where no CUDA kernel was built
  m.attr("compiler") = KERNELPOSE_COMPILER;
  for (const bindings::Bind bind : bindings::registered()) bind(m);
}
