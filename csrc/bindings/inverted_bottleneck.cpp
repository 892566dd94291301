#include "cpu/inverted_bottleneck.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bind.h"

#ifdef KERNELPOSE_WITH_CUDA
#include "cuda/inverted_bottleneck.h"
#endif

namespace kernelpose::bindings::inverted_bottleneck {
namespace {

// (batch, height, width, inputs, hidden, outputs, stride)
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

InvertedBottleneckShape shape_of(const ShapeTuple& sizes, bool residual,
                                 const std::array<int, 2>& activations) {
  const auto& [batch, height, width, inputs, hidden, outputs, stride] = sizes;
  const auto activation = [&](int i) { return static_cast<Activation>(activations[i]); };
  return {batch,   height, width,    inputs,        hidden,
          outputs, stride, residual, activation(0), activation(1)};
}

}  // namespace

KP_BIND(m) {
  // weights: of expand, depthwise and project, each with its bias; depthwise may be 0.
  m.def("cpu_inverted_bottleneck",
        [](Address x, const std::array<Address, 6>& weights, Address out, const ShapeTuple& sizes,
           bool residual, const std::array<int, 2>& activations, int threads) {
          using namespace cpu;
          const InvertedBottleneckShape shape = shape_of(sizes, residual, activations);
          const auto weight = [&](int i) { return pointer<const float>(weights[i]); };
          const InvertedBottleneckWeights all{weight(0), weight(1), weight(2),
                                              weight(3), weight(4), weight(5)};
          const py::gil_scoped_release release;
          check_memory(KP_SELECT_ISA(inverted_bottleneck_forward)(
                           pointer<const float>(x), all, pointer<float>(out), shape, threads),
                       "inverted_bottleneck");
        });
#ifdef KERNELPOSE_WITH_CUDA
  m.def("cuda_inverted_bottleneck",
        [](Address x, const std::array<Address, 6>& weights, Address out, const ShapeTuple& sizes,
           bool residual, const std::array<int, 2>& activations, int dtype, Address stream) {
          const cuda::InvertedBottleneckTensors tensors = {
              pointer(x),          pointer(weights[0]), pointer(weights[1]), pointer(weights[2]),
              pointer(weights[3]), pointer(weights[4]), pointer(weights[5]), pointer(out)};
          const py::gil_scoped_release release;
          check_cuda(cuda::inverted_bottleneck(tensors, shape_of(sizes, residual, activations),
                                               static_cast<DType>(dtype), stream_of(stream)),
                     "inverted_bottleneck");
        });
#endif
}

}  // namespace kernelpose::bindings::inverted_bottleneck
