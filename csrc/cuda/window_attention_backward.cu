// Backward of window_attention: which launches a problem takes, and what their workspace holds.
//
// Cells of at most one tile: both passes in one launch. Others, and pooled keys: the queries' pass,
// the pooled keys', the keys'. The bias gradient comes last, it needs the queries' pass's delta.
//
// Floor: q, k, v, dO, out read and dq, dk, dv written once, 8 * batch * tokens * C * sizeof(T)
// bytes (12 where the passes are launched apart, and 4 more for the bias gradient); 10 * D FLOP for
// each pair of tokens that meet, 14 as done here, since each pass has its own q k^T and dO v^T.
#include "window_attention.h"
#include "window_attention_bias_gradient.cuh"
#include "window_attention_dispatch.cuh"
#include "window_attention_passes.cuh"

namespace kernelpose::cuda {
namespace {

// Offsets in bytes, multiples of 256, and the sum.
struct BackwardWorkspace {
  int64_t delta, means, grad_means, bias_parts, bytes;

  BackwardWorkspace(const WindowAttentionShape& shape, int element_size, bool bias_gradient) {
    const int tile_rows = element_size == 4 ? Tile<float>::kRows : Tile<__half>::kRows;
    int64_t end = 0;
    const auto take = [&end](int64_t size) {
      const int64_t offset = end;
      end += (size + 255) / 256 * 256;
      return offset;
    };
    delta = take(shape.batch * shape.heads * shape.tokens() * sizeof(float));
    means = take(pool_means_elements(shape) * element_size);
    grad_means = take(pool_means_elements(shape) * sizeof(float));
    bias_parts = take(bias_gradient ? BiasParts(shape, tile_rows).elements() * sizeof(float) : 0);
    bytes = end;
  }
};

template <class T, int D>
cudaError_t launch_backward(const T* grad_out, const T* qkv, const float* bias, const T* out,
                            const float* lse, T* grad_qkv, float* grad_bias, char* workspace,
                            const WindowAttentionShape& shape, cudaStream_t stream) {
  const BackwardWorkspace layout(shape, sizeof(T), grad_bias != nullptr);
  T* const means = reinterpret_cast<T*>(workspace + layout.means);
  float* const grad_means = reinterpret_cast<float*>(workspace + layout.grad_means);
  const bool aligned = rows_aligned<T>(shape, {grad_out, qkv, out, grad_qkv, workspace});
  const BackwardArguments<T> args = {make_problem(shape, aligned),
                                     {},
                                     packed_matrix(qkv, 0, shape),
                                     token_matrix(out, shape),
                                     token_matrix(grad_out, shape),
                                     packed_keys(qkv, means, shape),
                                     packed_matrix(grad_qkv, 0, shape),
                                     packed_matrix(grad_qkv, 1, shape),
                                     packed_matrix(grad_qkv, 2, shape),
                                     pooled_matrix(grad_means, 0, shape),
                                     pooled_matrix(grad_means, 1, shape),
                                     bias,
                                     shared_bias(shape, bias),
                                     lse,
                                     reinterpret_cast<float*>(workspace + layout.delta)};

  cudaError_t error = cudaSuccess;
  const auto step = [&error](auto enqueue) {
    if (error == cudaSuccess) error = enqueue();
  };
  if (!shape.pooled && largest_cell(shape) <= Tile<T>::kRows) {
    step([&] { return launch_pass<T, D, Pass::kBoth>(args, stream); });
  } else {
    if (shape.pooled) {
      step([&] { return launch_pool_means(qkv, means, shape, aligned, stream); });
    }
    step([&] { return launch_pass<T, D, Pass::kQueries>(args, stream); });
    if (shape.pooled) {
      step([&] { return launch_pass<T, D, Pass::kPooledKeys>(args, stream); });
    }
    step([&] { return launch_pass<T, D, Pass::kKeys>(args, stream); });
  }
  if (grad_bias != nullptr) {
    const BiasGradientArguments<T> bias_args = {
        args.problem,
        {},
        args.query,
        args.keys,
        args.grad_out,
        bias,
        lse,
        args.delta,
        reinterpret_cast<float*>(workspace + layout.bias_parts)};
    step([&] { return launch_bias_gradient<T, D>(bias_args, grad_bias, stream); });
  }
  return error;
}

}  // namespace

int64_t window_attention_backward_workspace(const WindowAttentionShape& shape, DType dtype,
                                            bool bias_gradient) {
  return BackwardWorkspace(shape, element_size(dtype), bias_gradient).bytes;
}

cudaError_t window_attention_backward(const void* grad_out, const void* qkv, const float* bias,
                                      const void* out, const float* lse, void* grad_qkv,
                                      float* grad_bias, void* workspace,
                                      const WindowAttentionShape& shape, DType dtype,
                                      cudaStream_t stream) {
  if (shape.batch == 0) {  // the gradient of a sum over nothing
    if (grad_bias == nullptr) return cudaSuccess;
    const int64_t entries = int64_t{1} * shape.bias_rows() * shape.bias_columns() * shape.heads;
    return returned(cudaMemsetAsync(grad_bias, 0, entries * sizeof(float), stream));
  }
  return dispatch(dtype, shape, [&](auto type, auto width) {
    using T = decltype(type);
    return launch_backward<T, decltype(width)::value>(
        static_cast<const T*>(grad_out), static_cast<const T*>(qkv), bias,
        static_cast<const T*>(out), lse, static_cast<T*>(grad_qkv), grad_bias,
        static_cast<char*>(workspace), shape, stream);
  });
}

}  // namespace kernelpose::cuda
