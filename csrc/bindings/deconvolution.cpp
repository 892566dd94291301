#include "cpu/deconvolution.h"

#include <tuple>

#include "bind.h"

namespace kernelpose::bindings::deconvolution {
namespace {

// (batch, height, width, inputs, outputs)
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

}  // namespace

KP_BIND(m) {
  m.def("cpu_deconvolution_packed_size", [](int64_t inputs, int64_t outputs, int) {
    using namespace cpu;
    return KP_SELECT_ISA(deconvolution_packed_size)(inputs, outputs);
  });
  m.def("cpu_deconvolution_pack",
        [](Address weight, Address to, int64_t inputs, int64_t outputs, int) {
          using namespace cpu;
          const py::gil_scoped_release release;
          KP_SELECT_ISA(deconvolution_pack)
          (pointer<const float>(weight), inputs, outputs, pointer<float>(to));
        });
  m.def("cpu_deconvolution", [](Address x, Address packed, Address bias, Address out,
                                const ShapeTuple& sizes, int threads) {
    using namespace cpu;
    const auto& [batch, height, width, inputs, outputs] = sizes;
    const DeconvolutionShape shape{batch, height, width, inputs, outputs};
    const py::gil_scoped_release release;
    check_memory(KP_SELECT_ISA(deconvolution_forward)(
                     pointer<const float>(x), pointer<const float>(packed),
                     pointer<const float>(bias), pointer<float>(out), shape, threads),
                 "deconvolution");
  });
}

}  // namespace kernelpose::bindings::deconvolution
