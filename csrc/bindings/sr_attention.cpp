#include "cpu/sr_attention.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bind.h"

namespace kernelpose::bindings::sr_attention {
namespace {

// (batch, height, width, channels, heads, ratio, eps)
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int, int64_t, float>;

}  // namespace

KP_BIND(m) {
  m.def("cpu_sr_attention", [](Address x, const std::array<Address, 10>& weights, Address out,
                               const ShapeTuple& sizes, int threads) {
    using namespace cpu;
    const auto shape = std::apply([](auto... of) { return SrAttentionShape{of...}; }, sizes);
    const auto of = [&](int i) { return pointer<const float>(weights[i]); };
    const py::gil_scoped_release release;
    const SrAttentionWeights all{of(0), of(1), of(2), of(3), of(4),
                                 of(5), of(6), of(7), of(8), of(9)};
    check_memory(KP_SELECT_ISA(sr_attention_forward)(pointer<const float>(x), all,
                                                     pointer<float>(out), shape, threads),
                 "sr_attention");
  });
}

}  // namespace kernelpose::bindings::sr_attention
