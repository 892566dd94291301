#include "cpu/winograd_conv.h"

#include <tuple>

#include "bind.h"

namespace kernelpose::bindings::winograd_conv {
namespace {

// (batch, inputs, outputs, height, width, groups)
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

}  // namespace

KP_BIND(m) {
  m.def("cpu_winograd_conv_outputs", [] {
    using namespace cpu;
    return KP_SELECT_ISA(winograd_conv_outputs)();
  });
  m.def("cpu_winograd_conv",
        [](Address x, Address packed, Address out, const ShapeTuple& shape, int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          const bool ran = KP_SELECT_ISA(winograd_conv)(
              pointer<float>(x), pointer<float>(packed), pointer<float>(out),
              std::apply([](auto... of) { return WinogradConvShape{of...}; }, shape), threads);
          check_memory(ran, "winograd_conv");
        });
}

}  // namespace kernelpose::bindings::winograd_conv
