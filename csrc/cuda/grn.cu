// Global response normalisation: the two passes of kernelpose/channel_passes.cuh.
//
// Floor: x read and out written once, at 64 maps of 768 x 16 x 12 in half 38 MB, 13 us of an H100's
// memory; backward x and grad_out read and grad_x written, 57 MB, 19 us. The second reading comes
// from L2, which holds such a batch.
// budget: channel_sums<Grn*> registers<=80
// budget: scale_channels<Grn*> registers<=80
#include "grn.h"
#include "kernelpose/channel_passes.cuh"

namespace kernelpose::cuda {
namespace {

template <class T>
struct GrnNorms {
  using Element = T;
  static constexpr int kInputs = 1, kSums = 1;
  Maps maps;
  const T* inputs[1];  // x
  float* norms;

  __device__ __forceinline__ void accumulate(const float (&x)[1], float (&sum)[1]) const {
    sum[0] += x[0] * x[0];
  }
  __device__ __forceinline__ void finish(int64_t image, int64_t channel,
                                         const float (&sum)[1]) const {
    norms[image * maps.channels + channel] = sqrtf(sum[0]);
  }
};

template <class T>
struct GrnOutput {
  using Element = T;
  static constexpr int kInputs = 1, kOutputs = 1, kFactors = 2;
  static constexpr int kShared = channel_passes::kWarps;
  Maps maps;
  const T* inputs[1];  // x
  T* outputs[1];
  const float* gamma;
  const float* beta;
  const float* norms;
  float eps;

  // 1 / m
  __device__ __forceinline__ float prepare(int64_t image, float* shared) const {
    float sum[1] = {};
    for (int64_t c = threadIdx.x; c < maps.channels; c += channel_passes::kThreads) {
      sum[0] += norms[image * maps.channels + c];
    }
    channel_passes::block_sums(sum, shared);
    return 1.f / (sum[0] / maps.channels + eps);
  }
  __device__ __forceinline__ void factors(int64_t image, int64_t channel, float inverse, bool,
                                          float (&of)[2]) const {
    of[0] = 1.f + gamma[channel] * (norms[image * maps.channels + channel] * inverse);
    of[1] = beta[channel];
  }
  __device__ __forceinline__ void combine(const float (&x)[1], const float (&of)[2],
                                          float (&out)[1]) const {
    out[0] = x[0] * of[0] + of[1];
  }
};

template <class T>
struct GrnGradientSums {
  using Element = T;
  static constexpr int kInputs = 2, kSums = 2;
  Maps maps;
  const T* inputs[2];  // grad_out, x
  float* sums;

  __device__ __forceinline__ void accumulate(const float (&in)[2], float (&sum)[2]) const {
    sum[0] += in[0] * in[1];
    sum[1] += in[0];
  }
  __device__ __forceinline__ void finish(int64_t image, int64_t channel,
                                         const float (&sum)[2]) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) sums[(k * maps.batch + image) * maps.channels + channel] = sum[k];
  }
};

template <class T>
struct GrnGradient {
  using Element = T;
  static constexpr int kInputs = 2, kOutputs = 1, kFactors = 2;
  static constexpr int kShared = 2 * channel_passes::kWarps;
  struct Prepared {
    float inverse;  // 1 / m
    float shared;   // sum over channels of (a g) / (m^2 C)
  };
  Maps maps;
  const T* inputs[2];  // grad_out, x
  T* outputs[1];
  const float* gamma;
  const float* norms;
  float* sums;
  float eps;

  __device__ __forceinline__ Prepared prepare(int64_t image, float* shared) const {
    float sum[2] = {};
    for (int64_t c = threadIdx.x; c < maps.channels; c += channel_passes::kThreads) {
      const int64_t at = image * maps.channels + c;
      sum[0] += norms[at];
      sum[1] += gamma[c] * sums[at] * norms[at];
    }
    channel_passes::block_sums(sum, shared);
    const float inverse = 1.f / (sum[0] / maps.channels + eps);
    return {inverse, sum[1] * inverse * inverse / maps.channels};
  }
  __device__ __forceinline__ void factors(int64_t image, int64_t channel, const Prepared& prepared,
                                          bool owner, float (&of)[2]) const {
    const int64_t at = image * maps.channels + channel;
    const float scale = gamma[channel], norm = norms[at], sum = sums[at];
    const float response = norm * prepared.inverse;
    of[0] = 1.f + scale * response;
    of[1] = norm == 0.f ? 0.f : (scale * sum * prepared.inverse - prepared.shared) / norm;
    if (owner) sums[2 * maps.batch * maps.channels + at] = sum * response;
  }
  __device__ __forceinline__ void combine(const float (&in)[2], const float (&of)[2],
                                          float (&out)[1]) const {
    out[0] = in[0] * of[0] + in[1] * of[1];
  }
};

}  // namespace

cudaError_t grn_forward(const void* x, const float* gamma, const float* beta, void* out,
                        float* norms, const GrnShape& shape, DType dtype, cudaStream_t stream) {
  return channel_passes::with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const T* const in = static_cast<const T*>(x);
    const float eps = static_cast<float>(shape.eps);
    return channel_passes::run(
        GrnNorms<T>{shape.maps, {in}, norms},
        GrnOutput<T>{shape.maps, {in}, {static_cast<T*>(out)}, gamma, beta, norms, eps}, stream);
  });
}

cudaError_t grn_backward(const void* grad_out, const void* x, const float* gamma,
                         const float* norms, float* sums, void* grad_x, const GrnShape& shape,
                         DType dtype, cudaStream_t stream) {
  return channel_passes::with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const T *const grad = static_cast<const T*>(grad_out), *const in = static_cast<const T*>(x);
    const float eps = static_cast<float>(shape.eps);
    return channel_passes::run(
        GrnGradientSums<T>{shape.maps, {grad, in}, sums},
        GrnGradient<T>{shape.maps, {grad, in}, {static_cast<T*>(grad_x)}, gamma, norms, sums, eps},
        stream);
  });
}

}  // namespace kernelpose::cuda
