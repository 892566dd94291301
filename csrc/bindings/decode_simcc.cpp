#include "kernelpose/decode_simcc.h"

#include <tuple>

#include "bind.h"
#include "cpu/decode_simcc.h"

#ifdef KERNELPOSE_WITH_CUDA
#include "cuda/decode_simcc.h"
#endif

namespace kernelpose::bindings::decode_simcc {
namespace {

// (persons, joints, bins x, y, split ratio, span x, y)
using ShapeTuple = std::tuple<int64_t, int, int, int, float, float, float>;

DecodeSimccShape shape_of(const ShapeTuple& t) {
  const auto& [persons, joints, bins_x, bins_y, split_ratio, span_x, span_y] = t;
  return {persons, joints, bins_x, bins_y, split_ratio, span_x, span_y};
}

}  // namespace

KP_BIND(m) {
  m.def("cpu_decode_simcc",
        [](Address x, Address y, Address centers, Address scales, Address points, Address scores,
           const ShapeTuple& shape, int dtype, int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          KP_SELECT_ISA(decode_simcc)(pointer(x), pointer(y), pointer<float>(centers),
                                      pointer<float>(scales), pointer<float>(points),
                                      pointer<float>(scores), shape_of(shape),
                                      static_cast<DType>(dtype), threads);
        });
#ifdef KERNELPOSE_WITH_CUDA
  m.def("cuda_decode_simcc",
        [](Address x, Address y, Address centers, Address scales, Address points, Address scores,
           const ShapeTuple& shape, int dtype, Address stream) {
          const py::gil_scoped_release release;
          check_cuda(cuda::decode_simcc(pointer(x), pointer(y), pointer<float>(centers),
                                        pointer<float>(scales), pointer<float>(points),
                                        pointer<float>(scores), shape_of(shape),
                                        static_cast<DType>(dtype), stream_of(stream)),
                     "decode_simcc");
        });
#endif
}

}  // namespace kernelpose::bindings::decode_simcc
