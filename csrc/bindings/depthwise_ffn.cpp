#include "cpu/depthwise_ffn.h"

#include <tuple>

#include "bind.h"

namespace kernelpose::bindings::depthwise_ffn {
namespace {

// (batch, height, width, channels, hidden)
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

}  // namespace

KP_BIND(m) {
  m.def("cpu_depthwise_ffn_panel", [] {
    using namespace cpu;
    return KP_SELECT_ISA(depthwise_ffn_panel)();
  });
  m.def("cpu_depthwise_ffn",
        [](Address x, Address packed, Address out, const ShapeTuple& sizes, int threads) {
          using namespace cpu;
          const auto& [batch, height, width, channels, hidden] = sizes;
          const DepthwiseFFNShape shape{batch, height, width, channels, hidden};
          const py::gil_scoped_release release;
          check_memory(KP_SELECT_ISA(depthwise_ffn_forward)(pointer<const float>(x),
                                                            pointer<const float>(packed),
                                                            pointer<float>(out), shape, threads),
                       "depthwise_ffn");
        });
}

}  // namespace kernelpose::bindings::depthwise_ffn
