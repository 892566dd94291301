#include "kernelpose/dwconv_gelu.h"

#include <tuple>

#include "bind.h"
#include "cpu/dwconv_gelu.h"

#ifdef KERNELPOSE_WITH_CUDA
#include "cuda/dwconv_gelu.h"
#endif

namespace kernelpose::bindings::dwconv_gelu {
namespace {

// (batch, height, width, channels)
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;

DwconvGeluShape shape_of(const ShapeTuple& t) {
  const auto& [batch, height, width, channels] = t;
  return {batch, height, width, channels};
}

}  // namespace

KP_BIND(m) {
  m.def("cpu_dwconv_gelu_forward", [](Address x, Address weight, Address bias, Address out,
                                      const ShapeTuple& shape, int dtype, int threads) {
    using namespace cpu;
    const py::gil_scoped_release release;
    check_memory(
        KP_SELECT_ISA(dwconv_gelu_forward)(pointer(x), pointer(weight), pointer(bias), pointer(out),
                                           shape_of(shape), static_cast<DType>(dtype), threads),
        "dwconv_gelu");
  });
  m.def("cpu_dwconv_gelu_backward", [](Address grad_out, Address x, Address weight, Address bias,
                                       Address partial, Address grad_x, const ShapeTuple& shape,
                                       int dtype, int threads) {
    using namespace cpu;
    const py::gil_scoped_release release;
    check_memory(
        KP_SELECT_ISA(dwconv_gelu_backward)(pointer(grad_out), pointer(x), pointer(weight),
                                            pointer(bias), pointer(partial), pointer(grad_x),
                                            shape_of(shape), static_cast<DType>(dtype), threads),
        "dwconv_gelu");
  });
#ifdef KERNELPOSE_WITH_CUDA
  m.def("cuda_dwconv_gelu_parts",
        [](const ShapeTuple& shape) { return cuda::dwconv_gelu_parts(shape_of(shape)); });
  m.def("cuda_dwconv_gelu_forward", [](Address x, Address weight, Address bias, Address out,
                                       const ShapeTuple& shape, int dtype, Address stream) {
    const py::gil_scoped_release release;
    check_cuda(cuda::dwconv_gelu_forward(pointer(x), pointer<float>(weight), pointer<float>(bias),
                                         pointer(out), shape_of(shape), static_cast<DType>(dtype),
                                         stream_of(stream)),
               "dwconv_gelu");
  });
  m.def("cuda_dwconv_gelu_backward", [](Address grad_out, Address x, Address weight, Address bias,
                                        Address partial, Address grad_x, const ShapeTuple& shape,
                                        int dtype, Address stream) {
    const py::gil_scoped_release release;
    check_cuda(
        cuda::dwconv_gelu_backward(pointer(grad_out), pointer(x), pointer<float>(weight),
                                   pointer<float>(bias), pointer<float>(partial), pointer(grad_x),
                                   shape_of(shape), static_cast<DType>(dtype), stream_of(stream)),
        "dwconv_gelu");
  });
#endif
}

}  // namespace kernelpose::bindings::dwconv_gelu
