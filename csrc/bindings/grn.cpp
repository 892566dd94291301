#include "kernelpose/grn.h"

#include <tuple>

#include "bind.h"
#include "cpu/grn.h"

#ifdef KERNELPOSE_WITH_CUDA
#include "cuda/grn.h"
#endif

namespace kernelpose::bindings::grn {
namespace {

// (batch, channels, pixels, channels_last, eps)
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, bool, double>;

GrnShape shape_of(const ShapeTuple& t) {
  const auto& [batch, channels, pixels, channels_last, eps] = t;
  return {{batch, channels, pixels, channels_last}, eps};
}

}  // namespace

KP_BIND(m) {
  m.def("cpu_grn_forward", [](Address x, Address gamma, Address beta, Address out, Address norms,
                              const ShapeTuple& shape, int dtype, int threads) {
    using namespace cpu;
    const py::gil_scoped_release release;
    KP_SELECT_ISA(grn_forward)(pointer(x), pointer(gamma), pointer(beta), pointer(out),
                               pointer(norms), shape_of(shape), static_cast<DType>(dtype), threads);
  });
  m.def("cpu_grn_backward",
        [](Address grad_out, Address x, Address gamma, Address norms, Address sums, Address grad_x,
           const ShapeTuple& shape, int dtype, int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          KP_SELECT_ISA(grn_backward)(pointer(grad_out), pointer(x), pointer(gamma), pointer(norms),
                                      pointer(sums), pointer(grad_x), shape_of(shape),
                                      static_cast<DType>(dtype), threads);
        });
#ifdef KERNELPOSE_WITH_CUDA
  m.def("cuda_grn_forward", [](Address x, Address gamma, Address beta, Address out, Address norms,
                               const ShapeTuple& shape, int dtype, Address stream) {
    const py::gil_scoped_release release;
    check_cuda(cuda::grn_forward(pointer(x), pointer<float>(gamma), pointer<float>(beta),
                                 pointer(out), pointer<float>(norms), shape_of(shape),
                                 static_cast<DType>(dtype), stream_of(stream)),
               "grn");
  });
  m.def("cuda_grn_backward", [](Address grad_out, Address x, Address gamma, Address norms,
                                Address sums, Address grad_x, const ShapeTuple& shape, int dtype,
                                Address stream) {
    const py::gil_scoped_release release;
    check_cuda(cuda::grn_backward(pointer(grad_out), pointer(x), pointer<float>(gamma),
                                  pointer<float>(norms), pointer<float>(sums), pointer(grad_x),
                                  shape_of(shape), static_cast<DType>(dtype), stream_of(stream)),
               "grn");
  });
#endif
}

}  // namespace kernelpose::bindings::grn
