#include "kernelpose/spatial_gate.h"

#include <tuple>

#include "bind.h"
#include "cpu/spatial_gate.h"

#ifdef KERNELPOSE_WITH_CUDA
#include "cuda/spatial_gate.h"
#endif

namespace kernelpose::bindings::spatial_gate {
namespace {

// (batch, channels, pixels, channels_last, groups, limit, eps)
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, bool, int64_t, double, double>;

SpatialGateShape shape_of(const ShapeTuple& t) {
  const auto& [batch, channels, pixels, channels_last, groups, limit, eps] = t;
  return {{batch, channels, pixels, channels_last}, groups, limit, eps};
}

}  // namespace

KP_BIND(m) {
  m.def("cpu_spatial_gate_forward",
        [](Address x, Address weight, Address bias, Address out, Address statistics,
           Address scratch, const ShapeTuple& shape, int dtype, int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          KP_SELECT_ISA(spatial_gate_forward)(pointer(x), pointer(weight), pointer(bias),
                                              pointer(out), pointer(statistics), pointer(scratch),
                                              shape_of(shape), static_cast<DType>(dtype), threads);
        });
  m.def("cpu_spatial_gate_backward", [](Address grad_out, Address x, Address weight, Address bias,
                                        Address statistics, Address grad_x, Address grad_weight,
                                        Address grad_bias, Address scratch, const ShapeTuple& shape,
                                        int dtype, int threads) {
    using namespace cpu;
    const py::gil_scoped_release release;
    KP_SELECT_ISA(spatial_gate_backward)(pointer(grad_out), pointer(x), pointer(weight),
                                         pointer(bias), pointer(statistics), pointer(grad_x),
                                         pointer(grad_weight), pointer(grad_bias), pointer(scratch),
                                         shape_of(shape), static_cast<DType>(dtype), threads);
  });
#ifdef KERNELPOSE_WITH_CUDA
  m.def("cuda_spatial_gate_forward", [](Address x, Address weight, Address bias, Address out,
                                        Address statistics, Address scratch,
                                        const ShapeTuple& shape, int dtype, Address stream) {
    const py::gil_scoped_release release;
    check_cuda(cuda::spatial_gate_forward(pointer(x), pointer<float>(weight), pointer<float>(bias),
                                          pointer(out), pointer<float>(statistics), shape_of(shape),
                                          static_cast<DType>(dtype), stream_of(stream)),
               "spatial_gate");
  });
  m.def("cuda_spatial_gate_backward", [](Address grad_out, Address x, Address weight, Address bias,
                                         Address statistics, Address grad_x, Address grad_weight,
                                         Address grad_bias, Address scratch,
                                         const ShapeTuple& shape, int dtype, Address stream) {
    const py::gil_scoped_release release;
    check_cuda(cuda::spatial_gate_backward(
                   pointer(grad_out), pointer(x), pointer<float>(weight), pointer<float>(bias),
                   pointer<float>(statistics), pointer(grad_x), pointer<float>(grad_weight),
                   pointer<float>(grad_bias), pointer<float>(scratch), shape_of(shape),
                   static_cast<DType>(dtype), stream_of(stream)),
               "spatial_gate");
  });
#endif
}

}  // namespace kernelpose::bindings::spatial_gate
