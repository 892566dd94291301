#include "kernelpose/cascaded_attention.h"

#include <array>
#include <tuple>

#include "bind.h"
#include "cpu/cascaded_attention.h"
#include "cpu/cascaded_sr_attention.h"

#ifdef KERNELPOSE_WITH_CUDA
#include "cuda/cascaded_attention.h"
#endif

namespace kernelpose::bindings::cascaded_attention {
namespace {

// (batch, height, width, groups, group_width, heads, ratio, eps)
using ShapeTuple = std::tuple<int64_t, int, int, int, int, int, int, double>;

CascadedAttentionShape shape_of(const ShapeTuple& t) {
  const auto& [batch, height, width, groups, group_width, heads, ratio, eps] = t;
  return {batch, height, width, groups, group_width, heads, ratio, eps};
}

}  // namespace

KP_BIND(m) {
  m.def("cpu_cascaded_attention_forward",
        [](Address x, Address reduce_weight, Address reduce_bias, Address q_weight, Address q_bias,
           Address kv_weight, Address kv_bias, Address out_weight, Address out_bias,
           Address norm_weight, Address norm_bias, Address out, const ShapeTuple& shape, int dtype,
           int threads) {
          using namespace cpu;
          const py::gil_scoped_release release;
          const CascadedAttentionTensors tensors = {
              pointer(x),        pointer(reduce_weight), pointer(reduce_bias), pointer(q_weight),
              pointer(q_bias),   pointer(kv_weight),     pointer(kv_bias),     pointer(out_weight),
              pointer(out_bias), pointer(norm_weight),   pointer(norm_bias),   pointer(out)};
          check_memory(KP_SELECT_ISA(cascaded_attention_forward)(
                           tensors, shape_of(shape), static_cast<DType>(dtype), threads),
                       "cascaded_attention");
        });
  m.def("cpu_cascaded_sr_attention", [](Address x, const std::array<Address, 10>& parameters,
                                        Address found, Address packed, Address residual,
                                        Address out, const ShapeTuple& shape, int threads) {
    using namespace cpu;
    const py::gil_scoped_release release;
    const auto& p = parameters;
    const CascadedAttentionTensors tensors = {
        pointer(x),    pointer(p[0]), pointer(p[1]), pointer(p[2]), pointer(p[3]), pointer(p[4]),
        pointer(p[5]), pointer(p[6]), pointer(p[7]), pointer(p[8]), pointer(p[9]), pointer(found)};
    check_memory(KP_SELECT_ISA(cascaded_sr_attention_forward)(
                     tensors, shape_of(shape), pointer<const float>(packed),
                     pointer<const float>(residual), pointer<float>(out), threads),
                 "cascaded_sr_attention");
  });
#ifdef KERNELPOSE_WITH_CUDA
  m.def("cuda_cascaded_attention_workspace", [](const ShapeTuple& shape, int dtype) {
    return cuda::cascaded_attention_workspace(shape_of(shape), static_cast<DType>(dtype));
  });
  m.def("cuda_cascaded_attention_forward",
        [](Address x, Address reduce_weight, Address reduce_bias, Address q_weight, Address q_bias,
           Address kv_weight, Address kv_bias, Address out_weight, Address out_bias,
           Address norm_weight, Address norm_bias, Address out, Address workspace,
           const ShapeTuple& shape, int dtype, Address stream) {
          const py::gil_scoped_release release;
          const CascadedAttentionTensors tensors = {
              pointer(x),        pointer(reduce_weight), pointer(reduce_bias), pointer(q_weight),
              pointer(q_bias),   pointer(kv_weight),     pointer(kv_bias),     pointer(out_weight),
              pointer(out_bias), pointer(norm_weight),   pointer(norm_bias),   pointer(out)};
          check_cuda(cuda::cascaded_attention_forward(tensors, pointer(workspace), shape_of(shape),
                                                      static_cast<DType>(dtype), stream_of(stream)),
                     "cascaded_attention");
        });
#endif
}

}  // namespace kernelpose::bindings::cascaded_attention
