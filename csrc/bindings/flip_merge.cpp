#include "kernelpose/flip_merge.h"

#include <pybind11/stl.h>

#include <tuple>

#include "bind.h"
#include "cpu/flip_merge.h"

#ifdef KERNELPOSE_WITH_CUDA
#include "cuda/flip_merge.h"
#endif

namespace kernelpose::bindings::flip_merge {
namespace {

// (maps, rows, width, shift)
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, bool>;

FlipMergeShape shape_of(const ShapeTuple& t) {
  const auto& [maps, rows, width, shift] = t;
  return {maps, rows, width, shift};
}

}  // namespace

KP_BIND(m) {
  m.def("cpu_flip_merge",
        [](Address heatmaps, Address flipped, Address out, const std::vector<int>& order,
           const ShapeTuple& shape, int dtype, int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          KP_SELECT_ISA(flip_merge)(pointer(heatmaps), pointer(flipped), pointer(out), order.data(),
                                    static_cast<int>(order.size()), shape_of(shape),
                                    static_cast<DType>(dtype), threads);
        });
#ifdef KERNELPOSE_WITH_CUDA
  m.def("cuda_flip_merge",
        [](Address heatmaps, Address flipped, Address out, const std::vector<int>& order,
           const ShapeTuple& shape, int dtype, Address stream) {
          const py::gil_scoped_release release;
          check_cuda(cuda::flip_merge(pointer(heatmaps), pointer(flipped), pointer(out),
                                      order.data(), static_cast<int>(order.size()), shape_of(shape),
                                      static_cast<DType>(dtype), stream_of(stream)),
                     "flip_merge");
        });
#endif
}

}  // namespace kernelpose::bindings::flip_merge
