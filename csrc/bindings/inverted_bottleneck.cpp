#include "cpu/inverted_bottleneck.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bind.h"

namespace kernelpose::bindings {
namespace {

// (batch, height, width, inputs, hidden, outputs, stride)
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

}  // namespace

KP_BIND(m) {
  // weights: of expand, depthwise and project, each with its bias; depthwise may be 0.
  m.def("cpu_inverted_bottleneck",
        [](Address x, const std::array<Address, 6>& weights, Address out, const ShapeTuple& sizes,
           bool residual, const std::array<int, 2>& activations, int threads) {
          using namespace cpu;
          const auto& [batch, height, width, inputs, hidden, outputs, stride] = sizes;
          const InvertedBottleneckShape shape{batch,
                                              height,
                                              width,
                                              inputs,
                                              hidden,
                                              outputs,
                                              stride,
                                              residual,
                                              static_cast<Activation>(activations[0]),
                                              static_cast<Activation>(activations[1])};
          const auto weight = [&](int i) { return pointer<const float>(weights[i]); };
          const InvertedBottleneckWeights all{weight(0), weight(1), weight(2),
                                              weight(3), weight(4), weight(5)};
          const py::gil_scoped_release release;
          check_memory(KP_SELECT_ISA(inverted_bottleneck_forward)(
                           pointer<const float>(x), all, pointer<float>(out), shape, threads),
                       "inverted_bottleneck");
        });
}

}  // namespace kernelpose::bindings
