#include "kernelpose/multi_granularity.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bind.h"
#include "cpu/multi_granularity.h"

namespace kernelpose::bindings {
namespace {

// (batch, channels, pixels, channels_last, width, groups)
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, bool, int64_t, int64_t>;

MultiGranularityShape shape_of(const ShapeTuple& t) {
  const auto& [batch, channels, pixels, channels_last, width, groups] = t;
  return {{batch, channels, pixels, channels_last}, width, groups};
}

// Weights of the branches, their biases, the weight and the bias of the mix.
using Parameters = std::array<Address, 8>;

cpu::MultiGranularityWeights weights_of(const Parameters& p) {
  return {{pointer(p[0]), pointer(p[1]), pointer(p[2])},
          {pointer(p[3]), pointer(p[4]), pointer(p[5])},
          pointer(p[6]),
          pointer(p[7])};
}

cpu::MultiGranularityGradients gradients_of(Address x, const Parameters& p) {
  return {pointer(x),
          {pointer(p[0]), pointer(p[1]), pointer(p[2])},
          {pointer(p[3]), pointer(p[4]), pointer(p[5])},
          pointer(p[6]),
          pointer(p[7])};
}

}  // namespace

KP_BIND(m) {
  m.def("cpu_multi_granularity_forward", [](Address x, const Parameters& parameters, Address out,
                                            const ShapeTuple& shape, int dtype, int threads) {
    using namespace cpu;
    const py::gil_scoped_release release;
    const bool ran = KP_SELECT_ISA(multi_granularity_forward)(pointer(x), weights_of(parameters),
                                                              pointer(out), shape_of(shape),
                                                              static_cast<DType>(dtype), threads);
    check_memory(ran, "multi_granularity");
  });
  m.def("cpu_multi_granularity_backward",
        [](Address grad_out, Address x, const Parameters& parameters, Address grad_x,
           const Parameters& gradients, const ShapeTuple& shape, int dtype, int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          const bool ran = KP_SELECT_ISA(multi_granularity_backward)(
              pointer(grad_out), pointer(x), weights_of(parameters),
              gradients_of(grad_x, gradients), shape_of(shape), static_cast<DType>(dtype), threads);
          check_memory(ran, "the backward of multi_granularity");
        });
}

}  // namespace kernelpose::bindings
