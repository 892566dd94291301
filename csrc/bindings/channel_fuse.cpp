#include "kernelpose/channel_fuse.h"

#include <tuple>

#include "bind.h"
#include "cpu/channel_fuse.h"

#ifdef KERNELPOSE_WITH_CUDA
#include "cuda/channel_fuse.h"
#endif

namespace kernelpose::bindings::channel_fuse {
namespace {

// (batch, channels, pixels, channels_last, pairwise)
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, bool, bool>;

ChannelFuseShape shape_of(const ShapeTuple& t) {
  const auto& [batch, channels, pixels, channels_last, pairwise] = t;
  return {{batch, channels, pixels, channels_last}, pairwise};
}

}  // namespace

KP_BIND(m) {
  m.def("cpu_channel_fuse_forward", [](Address y1, Address y2, Address out, Address means,
                                       const ShapeTuple& shape, int dtype, int threads) {
    using namespace cpu;
    const py::gil_scoped_release release;
    KP_SELECT_ISA(channel_fuse_forward)(pointer(y1), pointer(y2), pointer(out), pointer(means),
                                        shape_of(shape), static_cast<DType>(dtype), threads);
  });
  m.def("cpu_channel_fuse_backward", [](Address grad_out, Address y1, Address y2, Address means,
                                        Address products, Address grad_y1, Address grad_y2,
                                        const ShapeTuple& shape, int dtype, int threads) {
    using namespace cpu;
    const py::gil_scoped_release release;
    KP_SELECT_ISA(channel_fuse_backward)(
        pointer(grad_out), pointer(y1), pointer(y2), pointer(means), pointer(products),
        pointer(grad_y1), pointer(grad_y2), shape_of(shape), static_cast<DType>(dtype), threads);
  });
#ifdef KERNELPOSE_WITH_CUDA
  m.def("cuda_channel_fuse_forward", [](Address y1, Address y2, Address out, Address means,
                                        const ShapeTuple& shape, int dtype, Address stream) {
    const py::gil_scoped_release release;
    check_cuda(
        cuda::channel_fuse_forward(pointer(y1), pointer(y2), pointer(out), pointer<float>(means),
                                   shape_of(shape), static_cast<DType>(dtype), stream_of(stream)),
        "channel_fuse");
  });
  m.def("cuda_channel_fuse_backward", [](Address grad_out, Address y1, Address y2, Address means,
                                         Address products, Address grad_y1, Address grad_y2,
                                         const ShapeTuple& shape, int dtype, Address stream) {
    const py::gil_scoped_release release;
    check_cuda(cuda::channel_fuse_backward(pointer(grad_out), pointer(y1), pointer(y2),
                                           pointer<float>(means), pointer<float>(products),
                                           pointer(grad_y1), pointer(grad_y2), shape_of(shape),
                                           static_cast<DType>(dtype), stream_of(stream)),
               "channel_fuse");
  });
#endif
}

}  // namespace kernelpose::bindings::channel_fuse
