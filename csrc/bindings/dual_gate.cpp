#include "kernelpose/dual_gate.h"

#include <tuple>

#include "bind.h"
#include "cpu/dual_gate.h"

#ifdef KERNELPOSE_WITH_CUDA
#include "cuda/dual_gate.h"
#endif

namespace kernelpose::bindings::dual_gate {
namespace {

// (batch, channels, pixels, channels_last, width, hidden)
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, bool, int64_t, int64_t>;

DualGateShape shape_of(const ShapeTuple& t) {
  const auto& [batch, channels, pixels, channels_last, width, hidden] = t;
  return {{batch, channels, pixels, channels_last}, width, hidden};
}

}  // namespace

KP_BIND(m) {
  m.def("cpu_dual_gate_forward",
        [](Address y, Address reduce_weight, Address expand_weight, Address spatial_weight,
           Address out, Address state, const ShapeTuple& shape, int dtype, int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          const bool ran = KP_SELECT_ISA(dual_gate_forward)(
              pointer(y), pointer(reduce_weight), pointer(expand_weight), pointer(spatial_weight),
              pointer(out), pointer(state), shape_of(shape), static_cast<DType>(dtype), threads);
          check_memory(ran, "dual_gate");
        });
  m.def("cpu_dual_gate_backward",
        [](Address grad_out, Address y, Address reduce_weight, Address expand_weight,
           Address spatial_weight, Address state, Address grad_y, Address partials,
           const ShapeTuple& shape, int dtype, int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          const bool ran = KP_SELECT_ISA(dual_gate_backward)(
              pointer(grad_out), pointer(y), pointer(reduce_weight), pointer(expand_weight),
              pointer(spatial_weight), pointer(state), pointer(grad_y), pointer(partials),
              shape_of(shape), static_cast<DType>(dtype), threads);
          check_memory(ran, "the backward of dual_gate");
        });
#ifdef KERNELPOSE_WITH_CUDA
  m.def("cuda_dual_gate_workspace",
        [](const ShapeTuple& shape) { return cuda::dual_gate_workspace(shape_of(shape)); });
  m.def("cuda_dual_gate_forward", [](Address y, Address reduce_weight, Address expand_weight,
                                     Address spatial_weight, Address out, Address state,
                                     Address workspace, const ShapeTuple& shape, int dtype,
                                     Address stream) {
    const py::gil_scoped_release release;
    const cudaError_t error = cuda::dual_gate_forward(
        pointer(y), pointer<float>(reduce_weight), pointer<float>(expand_weight),
        pointer<float>(spatial_weight), pointer(out), pointer<float>(state),
        pointer<float>(workspace), shape_of(shape), static_cast<DType>(dtype), stream_of(stream));
    check_cuda(error, "dual_gate");
  });
  m.def("cuda_dual_gate_backward",
        [](Address grad_out, Address y, Address reduce_weight, Address expand_weight,
           Address spatial_weight, Address state, Address grad_y, Address partials,
           Address workspace, const ShapeTuple& shape, int dtype, Address stream) {
          const py::gil_scoped_release release;
          const cudaError_t error = cuda::dual_gate_backward(
              pointer(grad_out), pointer(y), pointer<float>(reduce_weight),
              pointer<float>(expand_weight), pointer<float>(spatial_weight), pointer<float>(state),
              pointer(grad_y), pointer<float>(partials), pointer<float>(workspace), shape_of(shape),
              static_cast<DType>(dtype), stream_of(stream));
          check_cuda(error, "the backward of dual_gate");
        });
#endif
}

}  // namespace kernelpose::bindings::dual_gate
