#include "kernelpose/add_layer_norm.h"

#include <tuple>

#include "bind.h"
#include "cpu/add_layer_norm.h"

#ifdef KERNELPOSE_WITH_CUDA
#include "cuda/add_layer_norm.h"
#endif
namespace kernelpose::bindings::add_layer_norm {
namespace {

// (rows, channels, eps)
using ShapeTuple = std::tuple<int64_t, int64_t, double>;
// Dtype codes of x, of the sum and of the parameters.
using TypesTuple = std::tuple<int, int, int>;

AddLayerNormShape shape_of(const ShapeTuple& t) {
  return {std::get<0>(t), std::get<1>(t), std::get<2>(t)};
}

AddLayerNormTypes types_of(const TypesTuple& t) {
  return {static_cast<DType>(std::get<0>(t)), static_cast<DType>(std::get<1>(t)),
          static_cast<DType>(std::get<2>(t))};
}

}  // namespace

KP_BIND(m) {
  m.def("cpu_add_layer_norm_forward",
        [](Address x, Address residual, Address weight, Address bias, Address sum, Address norm,
           Address moments, const ShapeTuple& shape, const TypesTuple& types, int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          check_memory(
              KP_SELECT_ISA(add_layer_norm_forward)(
                  pointer(x), pointer(residual), pointer(weight), pointer(bias), pointer(sum),
                  pointer(norm), pointer(moments), shape_of(shape), types_of(types), threads),
              "add_layer_norm");
        });
  m.def("cpu_add_layer_norm_backward",
        [](Address grad_sum, Address grad_norm, Address sum, Address moments, Address weight,
           Address grad_residual, Address grad_x, Address grad_parameters, const ShapeTuple& shape,
           const TypesTuple& types, int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          check_memory(KP_SELECT_ISA(add_layer_norm_backward)(
                           pointer(grad_sum), pointer(grad_norm), pointer(sum), pointer(moments),
                           pointer(weight), pointer(grad_residual), pointer(grad_x),
                           pointer(grad_parameters), shape_of(shape), types_of(types), threads),
                       "add_layer_norm");
        });
#ifdef KERNELPOSE_WITH_CUDA
  m.def("cuda_add_layer_norm_forward",
        [](Address x, Address residual, Address weight, Address bias, Address sum, Address norm,
           Address moments, const ShapeTuple& shape, const TypesTuple& types, Address stream) {
          const py::gil_scoped_release release;
          check_cuda(cuda::add_layer_norm_forward(pointer(x), pointer(residual), pointer(weight),
                                                  pointer(bias), pointer(sum), pointer(norm),
                                                  pointer<float>(moments), shape_of(shape),
                                                  types_of(types), stream_of(stream)),
                     "add_layer_norm");
        });
  m.def("cuda_add_layer_norm_parts", [](const ShapeTuple& shape, const TypesTuple& types) {
    return cuda::add_layer_norm_parts(shape_of(shape), types_of(types));
  });
  m.def("cuda_add_layer_norm_backward", [](Address grad_sum, Address grad_norm, Address sum,
                                           Address moments, Address weight, Address grad_residual,
                                           Address grad_x, Address parts, const ShapeTuple& shape,
                                           const TypesTuple& types, Address stream) {
    const py::gil_scoped_release release;
    check_cuda(cuda::add_layer_norm_backward(
                   pointer(grad_sum), pointer(grad_norm), pointer(sum), pointer<float>(moments),
                   pointer(weight), pointer(grad_residual), pointer(grad_x), pointer<float>(parts),
                   shape_of(shape), types_of(types), stream_of(stream)),
               "add_layer_norm");
  });
#endif
}

}  // namespace kernelpose::bindings::add_layer_norm
