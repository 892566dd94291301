#include "kernelpose/heatmap_loss.h"

#include <tuple>

#include "bind.h"
#include "cpu/heatmap_loss.h"

#ifdef KERNELPOSE_WITH_CUDA
#include "cuda/heatmap_loss.h"
#endif

namespace kernelpose::bindings::heatmap_loss {
namespace {

// (maps, height, width, ratio x, ratio y, sigma, codec)
using ShapeTuple = std::tuple<int64_t, int, int, double, double, double, int>;

HeatmapLossShape shape_of(const ShapeTuple& t) {
  const auto& [maps, height, width, ratio_x, ratio_y, sigma, codec] = t;
  return {maps, height, width, ratio_x, ratio_y, sigma, static_cast<TargetCodec>(codec)};
}

}  // namespace

KP_BIND(m) {
  m.def("cpu_heatmap_loss_forward",
        [](Address pred, Address keypoints, Address visible, Address loss, const ShapeTuple& shape,
           int dtype, int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          check_memory(KP_SELECT_ISA(heatmap_loss_forward)(
                           pointer(pred), pointer(keypoints), pointer(visible), pointer(loss),
                           shape_of(shape), static_cast<DType>(dtype), threads),
                       "heatmap_loss");
        });
  m.def("cpu_heatmap_loss_backward",
        [](Address grad_loss, Address pred, Address keypoints, Address visible, Address grad_pred,
           const ShapeTuple& shape, int dtype, int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          check_memory(KP_SELECT_ISA(heatmap_loss_backward)(
                           pointer(grad_loss), pointer(pred), pointer(keypoints), pointer(visible),
                           pointer(grad_pred), shape_of(shape), static_cast<DType>(dtype), threads),
                       "heatmap_loss");
        });
#ifdef KERNELPOSE_WITH_CUDA
  m.def("cuda_heatmap_loss_forward_workspace", [](const ShapeTuple& shape) {
    return cuda::heatmap_loss_forward_workspace(shape_of(shape));
  });
  m.def("cuda_heatmap_loss_forward",
        [](Address pred, Address keypoints, Address visible, Address loss, Address workspace,
           const ShapeTuple& shape, int dtype, Address stream) {
          const py::gil_scoped_release release;
          check_cuda(cuda::heatmap_loss_forward(pointer(pred), pointer<float>(keypoints),
                                                pointer<float>(visible), pointer<float>(loss),
                                                pointer<float>(workspace), shape_of(shape),
                                                static_cast<DType>(dtype), stream_of(stream)),
                     "heatmap_loss");
        });
  m.def("cuda_heatmap_loss_backward",
        [](Address grad_loss, Address pred, Address keypoints, Address visible, Address grad_pred,
           const ShapeTuple& shape, int dtype, Address stream) {
          const py::gil_scoped_release release;
          check_cuda(cuda::heatmap_loss_backward(pointer<float>(grad_loss), pointer(pred),
                                                 pointer<float>(keypoints), pointer<float>(visible),
                                                 pointer(grad_pred), shape_of(shape),
                                                 static_cast<DType>(dtype), stream_of(stream)),
                     "heatmap_loss");
        });
#endif
}

}  // namespace kernelpose::bindings::heatmap_loss
