#include "kernelpose/reduced_attention.h"

#include <tuple>

#include "bind.h"
#include "cpu/reduced_attention.h"

#ifdef KERNELPOSE_WITH_CUDA
#include "cuda/reduced_attention.h"
#endif

namespace kernelpose::bindings::reduced_attention {
namespace {

// (batch, queries, keys, heads, head_dim, scale)
using ShapeTuple = std::tuple<int64_t, int, int, int, int, double>;

ReducedAttentionShape shape_of(const ShapeTuple& t) {
  const auto& [batch, queries, keys, heads, head_dim, scale] = t;
  return {batch, queries, keys, heads, head_dim, scale};
}

}  // namespace

KP_BIND(m) {
  m.def("cpu_reduced_attention_forward", [](Address q, Address kv, Address out, Address lse,
                                            const ShapeTuple& shape, int dtype, int threads) {
    using namespace cpu;
    const py::gil_scoped_release release;
    check_memory(KP_SELECT_ISA(reduced_attention_forward)(pointer(q), pointer(kv), pointer(out),
                                                          pointer(lse), shape_of(shape),
                                                          static_cast<DType>(dtype), threads),
                 "reduced_attention");
  });
  m.def("cpu_reduced_attention_backward", [](Address grad_out, Address q, Address kv, Address lse,
                                             Address grad_q, Address grad_kv,
                                             const ShapeTuple& shape, int dtype, int threads) {
    using namespace cpu;
    const py::gil_scoped_release release;
    check_memory(KP_SELECT_ISA(reduced_attention_backward)(
                     pointer(grad_out), pointer(q), pointer(kv), pointer(lse), pointer(grad_q),
                     pointer(grad_kv), shape_of(shape), static_cast<DType>(dtype), threads),
                 "reduced_attention");
  });
#ifdef KERNELPOSE_WITH_CUDA
  m.def("cuda_reduced_attention_backward_workspace", [](const ShapeTuple& shape, int dtype) {
    return cuda::reduced_attention_backward_workspace(shape_of(shape), static_cast<DType>(dtype));
  });
  m.def("cuda_reduced_attention_forward", [](Address q, Address kv, Address out, Address lse,
                                             const ShapeTuple& shape, int dtype, Address stream) {
    const py::gil_scoped_release release;
    check_cuda(cuda::reduced_attention_forward(pointer(q), pointer(kv), pointer(out),
                                               pointer<float>(lse), shape_of(shape),
                                               static_cast<DType>(dtype), stream_of(stream)),
               "reduced_attention");
  });
  m.def("cuda_reduced_attention_backward",
        [](Address grad_out, Address q, Address kv, Address lse, Address grad_q, Address grad_kv,
           Address workspace, const ShapeTuple& shape, int dtype, Address stream) {
          const py::gil_scoped_release release;
          check_cuda(cuda::reduced_attention_backward(
                         pointer(grad_out), pointer(q), pointer(kv), pointer<float>(lse),
                         pointer(grad_q), pointer(grad_kv), pointer(workspace), shape_of(shape),
                         static_cast<DType>(dtype), stream_of(stream)),
                     "reduced_attention");
        });
#endif
}

}  // namespace kernelpose::bindings::reduced_attention
