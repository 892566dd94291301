#include "kernelpose/window_attention.h"

#include <tuple>

#include "bind.h"
#include "cpu/window_attention.h"

#ifdef KERNELPOSE_WITH_CUDA
#include "cuda/window_attention.h"
#endif

namespace kernelpose::bindings::window_attention {
namespace {

// (batch, height, width, heads, head_dim, window h, w, shift h, w, grid, pooled, scale)
using ShapeTuple = std::tuple<int64_t, int, int, int, int, int, int, int, int, bool, bool, double>;

WindowAttentionShape shape_of(const ShapeTuple& t) {
  const auto& [batch, height, width, heads, head_dim, window_h, window_w, shift_h, shift_w, grid,
               pooled, scale] = t;
  return {batch,
          {height, window_h, shift_h, grid},
          {width, window_w, shift_w, grid},
          heads,
          head_dim,
          pooled,
          scale};
}

}  // namespace

KP_BIND(m) {
  m.def("cpu_window_attention_forward", [](Address qkv, Address bias, Address out, Address lse,
                                           const ShapeTuple& shape, int dtype, int threads) {
    using namespace cpu;
    const py::gil_scoped_release release;
    check_memory(KP_SELECT_ISA(window_attention_forward)(pointer(qkv), pointer(bias), pointer(out),
                                                         pointer(lse), shape_of(shape),
                                                         static_cast<DType>(dtype), threads),
                 "window_attention");
  });
  m.def("cpu_window_attention_backward",
        [](Address grad_out, Address qkv, Address bias, Address out, Address lse, Address grad_qkv,
           Address grad_bias, const ShapeTuple& shape, int dtype, int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          check_memory(KP_SELECT_ISA(window_attention_backward)(
                           pointer(grad_out), pointer(qkv), pointer(bias), pointer(out),
                           pointer(lse), pointer(grad_qkv), pointer(grad_bias), shape_of(shape),
                           static_cast<DType>(dtype), threads),
                       "window_attention");
        });
#ifdef KERNELPOSE_WITH_CUDA
  m.def("cuda_window_attention_forward_workspace", [](const ShapeTuple& shape, int dtype) {
    return cuda::window_attention_forward_workspace(shape_of(shape), static_cast<DType>(dtype));
  });
  m.def("cuda_window_attention_backward_workspace",
        [](const ShapeTuple& shape, int dtype, bool bias_gradient) {
          return cuda::window_attention_backward_workspace(
              shape_of(shape), static_cast<DType>(dtype), bias_gradient);
        });
  m.def("cuda_window_attention_forward",
        [](Address qkv, Address bias, Address out, Address lse, Address workspace,
           const ShapeTuple& shape, int dtype, Address stream) {
          const py::gil_scoped_release release;
          check_cuda(cuda::window_attention_forward(pointer(qkv), pointer<float>(bias),
                                                    pointer(out), pointer<float>(lse),
                                                    pointer(workspace), shape_of(shape),
                                                    static_cast<DType>(dtype), stream_of(stream)),
                     "window_attention");
        });
  m.def(
      "cuda_window_attention_backward",
      [](Address grad_out, Address qkv, Address bias, Address out, Address lse, Address grad_qkv,
         Address grad_bias, Address workspace, const ShapeTuple& shape, int dtype, Address stream) {
        const py::gil_scoped_release release;
        check_cuda(
            cuda::window_attention_backward(
                pointer(grad_out), pointer(qkv), pointer<float>(bias), pointer(out),
                pointer<float>(lse), pointer(grad_qkv), pointer<float>(grad_bias),
                pointer(workspace), shape_of(shape), static_cast<DType>(dtype), stream_of(stream)),
            "window_attention");
      });
#endif
}

}  // namespace kernelpose::bindings::window_attention
