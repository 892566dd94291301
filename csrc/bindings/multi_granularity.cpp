#include "kernelpose/multi_granularity.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bind.h"
#include "cpu/multi_granularity.h"

#ifdef KERNELPOSE_WITH_CUDA
#include "cuda/multi_granularity.h"
#endif

namespace kernelpose::bindings::multi_granularity {
namespace {

// (batch, channels, pixels, channels_last, width, groups)
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, bool, int64_t, int64_t>;

MultiGranularityShape shape_of(const ShapeTuple& t) {
  const auto& [batch, channels, pixels, channels_last, width, groups] = t;
  return {{batch, channels, pixels, channels_last}, width, groups};
}

// Weights of the branches, their biases, the weight and the bias of the mix.
using Parameters = std::array<Address, 8>;

// For either device: cpu and cuda have a struct of the same members.
template <class Weights, class T = void>
Weights weights_of(const Parameters& p) {
  return {{pointer<T>(p[0]), pointer<T>(p[1]), pointer<T>(p[2])},
          {pointer<T>(p[3]), pointer<T>(p[4]), pointer<T>(p[5])},
          pointer<T>(p[6]),
          pointer<T>(p[7])};
}

template <class Gradients, class T = void>
Gradients gradients_of(Address x, const Parameters& p) {
  return {pointer(x),
          {pointer<T>(p[0]), pointer<T>(p[1]), pointer<T>(p[2])},
          {pointer<T>(p[3]), pointer<T>(p[4]), pointer<T>(p[5])},
          pointer<T>(p[6]),
          pointer<T>(p[7])};
}

}  // namespace

KP_BIND(m) {
  m.def("cpu_multi_granularity_forward", [](Address x, const Parameters& parameters, Address out,
                                            const ShapeTuple& shape, int dtype, int threads) {
    using namespace cpu;
    const py::gil_scoped_release release;
    const bool ran = KP_SELECT_ISA(multi_granularity_forward)(
        pointer(x), weights_of<MultiGranularityWeights>(parameters), pointer(out), shape_of(shape),
        static_cast<DType>(dtype), threads);
    check_memory(ran, "multi_granularity");
  });
  m.def("cpu_multi_granularity_backward",
        [](Address grad_out, Address x, const Parameters& parameters, Address grad_x,
           const Parameters& gradients, Address, const ShapeTuple& shape, int dtype, int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          const bool ran = KP_SELECT_ISA(multi_granularity_backward)(
              pointer(grad_out), pointer(x), weights_of<MultiGranularityWeights>(parameters),
              gradients_of<MultiGranularityGradients>(grad_x, gradients), shape_of(shape),
              static_cast<DType>(dtype), threads);
          check_memory(ran, "the backward of multi_granularity");
        });
#ifdef KERNELPOSE_WITH_CUDA
  m.def("cuda_multi_granularity_forward", [](Address x, const Parameters& parameters, Address out,
                                             const ShapeTuple& shape, int dtype, Address stream) {
    using namespace cuda;
    const py::gil_scoped_release release;
    check_cuda(multi_granularity_forward(
                   pointer(x), weights_of<MultiGranularityWeights, float>(parameters), pointer(out),
                   shape_of(shape), static_cast<DType>(dtype), stream_of(stream)),
               "multi_granularity");
  });
  m.def("cuda_multi_granularity_backward_workspace", [](const ShapeTuple& shape, int dtype) {
    return cuda::multi_granularity_backward_workspace(shape_of(shape), static_cast<DType>(dtype));
  });
  m.def("cuda_multi_granularity_backward", [](Address grad_out, Address x,
                                              const Parameters& parameters, Address grad_x,
                                              const Parameters& gradients, Address workspace,
                                              const ShapeTuple& shape, int dtype, Address stream) {
    using namespace cuda;
    const py::gil_scoped_release release;
    check_cuda(
        multi_granularity_backward(
            pointer(grad_out), pointer(x), weights_of<MultiGranularityWeights, float>(parameters),
            gradients_of<MultiGranularityGradients, float>(grad_x, gradients), pointer(workspace),
            shape_of(shape), static_cast<DType>(dtype), stream_of(stream)),
        "multi_granularity");
  });
#endif
}

}  // namespace kernelpose::bindings::multi_granularity
