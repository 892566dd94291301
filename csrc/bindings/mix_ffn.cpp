#include "cpu/mix_ffn.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bind.h"

namespace kernelpose::bindings::mix_ffn {
namespace {

// (batch, height, width, inputs, hidden, outputs)
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

}  // namespace

KP_BIND(m) {
  m.attr("cpu_mix_ffn_block") = cpu::kMixFfnBlock;
  m.def("cpu_panel_columns", [] {
    using namespace cpu;
    return KP_SELECT_ISA(panel_columns)();
  });
  m.def("cpu_mix_ffn", [](Address x, const std::array<Address, 6>& weights, Address out,
                          const ShapeTuple& sizes, int threads) {
    using namespace cpu;
    const auto shape = std::apply([](auto... of) { return MixFfnShape{of...}; }, sizes);
    const auto of = [&](int i) { return pointer<const float>(weights[i]); };
    const py::gil_scoped_release release;
    check_memory(KP_SELECT_ISA(mix_ffn_forward)(pointer<const float>(x),
                                                {of(0), of(1), of(2), of(3), of(4), of(5)},
                                                pointer<float>(out), shape, threads),
                 "mix_ffn");
  });
}

}  // namespace kernelpose::bindings::mix_ffn
