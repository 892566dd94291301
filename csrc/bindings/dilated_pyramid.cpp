#include "kernelpose/dilated_pyramid.h"

#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "bind.h"
#include "cpu/dilated_pyramid.h"

#ifdef KERNELPOSE_WITH_CUDA
#include "cuda/dilated_pyramid.h"
#endif

namespace kernelpose::bindings::dilated_pyramid {
namespace {

// (batch, channels, height, width, channels_last, stride, relu, sum)
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, bool, int64_t, bool, bool>;

DilatedPyramidShape shape_of(const ShapeTuple& t) {
  return std::apply([](auto... of) { return DilatedPyramidShape{of...}; }, t);
}

// (weight, bias, channels, dilation)
using LayerTuple = std::tuple<Address, Address, int64_t, int64_t>;

DilatedPyramidLayers layers_of(const std::vector<LayerTuple>& tuples) {
  DilatedPyramidLayers layers;
  for (const auto& [weight, bias, channels, dilation] : tuples) {
    layers.push_back({pointer(weight), pointer(bias), channels, dilation});
  }
  return layers;
}

cpu::DilatedPyramidGradients gradients_of(Address x, const std::vector<Address>& weights,
                                          const std::vector<Address>& biases) {
  cpu::DilatedPyramidGradients gradients = {pointer(x), {}, {}};
  for (const Address weight : weights) gradients.weights.push_back(pointer(weight));
  for (const Address bias : biases) gradients.biases.push_back(pointer(bias));
  return gradients;
}

#ifdef KERNELPOSE_WITH_CUDA
// (rows, columns, grad_out_row, map_row)
using RowsTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;

cuda::PyramidRows rows_of(const RowsTuple& t) {
  return std::apply([](auto... of) { return cuda::PyramidRows{of...}; }, t);
}
#endif

}  // namespace

KP_BIND(m) {
  m.def("cpu_dilated_pyramid_forward",
        [](Address x, const std::vector<LayerTuple>& layers, Address out, Address maps,
           const ShapeTuple& shape, int dtype, int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          const bool ran = KP_SELECT_ISA(dilated_pyramid_forward)(
              pointer(x), layers_of(layers), pointer(out), pointer(maps), shape_of(shape),
              static_cast<DType>(dtype), threads);
          check_memory(ran, "dilated_pyramid");
        });
  m.def("cpu_dilated_pyramid_backward",
        [](Address grad_out, Address x, Address maps, const std::vector<LayerTuple>& layers,
           Address grad_x, const std::vector<Address>& of_weights,
           const std::vector<Address>& of_biases, const ShapeTuple& shape, int dtype, int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          const bool ran = KP_SELECT_ISA(dilated_pyramid_backward)(
              pointer(grad_out), pointer(x), pointer(maps), layers_of(layers),
              gradients_of(grad_x, of_weights, of_biases), shape_of(shape),
              static_cast<DType>(dtype), threads);
          check_memory(ran, "the backward of dilated_pyramid");
        });
#ifdef KERNELPOSE_WITH_CUDA
  m.def("cuda_dilated_pyramid_workspace",
        [](const std::vector<LayerTuple>& layers, const ShapeTuple& shape) {
          return cuda::dilated_pyramid_workspace(layers_of(layers), shape_of(shape));
        });
  m.def("cuda_dilated_pyramid_forward", [](Address x, const std::vector<LayerTuple>& layers,
                                           Address out, Address maps, bool keep, Address packed,
                                           const ShapeTuple& shape, int dtype, Address stream) {
    const py::gil_scoped_release release;
    check_cuda(cuda::dilated_pyramid_forward(pointer(x), layers_of(layers), pointer(out),
                                             pointer(maps), keep, pointer(packed), shape_of(shape),
                                             static_cast<DType>(dtype), stream_of(stream)),
               "dilated_pyramid");
  });
  m.def("cuda_dilated_pyramid_mask", [](Address grad_out, Address carry, Address map, Address grad,
                                        const RowsTuple& rows, int dtype, Address stream) {
    const py::gil_scoped_release release;
    check_cuda(
        cuda::dilated_pyramid_mask(pointer(grad_out), pointer(carry), pointer(map), pointer(grad),
                                   rows_of(rows), static_cast<DType>(dtype), stream_of(stream)),
        "the backward of dilated_pyramid");
  });
#endif
}

}  // namespace kernelpose::bindings::dilated_pyramid
