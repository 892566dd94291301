// CRU's fusion: the two passes of kernelpose/channel_passes.cuh.
//
// Floor: y1 and y2 read and out written once, at 64 maps of 768 x 16 x 12 in half 57 MB, 19 us of
// an H100's memory; backward three maps read and two written, 94 MB, 31 us.
// budget: channel_sums<Fuse*> registers<=80
// budget: scale_channels<Fuse*> registers<=80
#include "channel_fuse.h"
#include "kernelpose/channel_passes.cuh"

namespace kernelpose::cuda {
namespace {

// The weights of an image's channels, from its means (2, channels).
struct FuseSoftmax {
  const float* means;
  int64_t channels;
  bool pairwise;
  float largest = 0.f, inverse = 1.f;  // joint: the largest mean, 1 / sum of exponentials

  // By the whole block; `shared` holds 2 * kWarps numbers.
  __device__ __forceinline__ FuseSoftmax(const float* image_means, const Maps& maps, bool pairs,
                                         float* shared)
      : means(image_means), channels(maps.channels), pairwise(pairs) {
    if (pairwise) return;
    float top = -INFINITY, sum[1] = {};
    for (int64_t i = threadIdx.x; i < 2 * channels; i += channel_passes::kThreads) {
      top = fmaxf(top, means[i]);
    }
    largest = channel_passes::block_maximum(top, shared);
    for (int64_t i = threadIdx.x; i < 2 * channels; i += channel_passes::kThreads) {
      sum[0] += expf(means[i] - largest);
    }
    channel_passes::block_sums(sum, shared + channel_passes::kWarps);
    inverse = 1.f / sum[0];
  }

  __device__ __forceinline__ float joint(int64_t i) const {
    return expf(means[i] - largest) * inverse;
  }
  __device__ __forceinline__ void weights(int64_t channel, float (&w)[2]) const {
    if (pairwise) {
      const float difference = means[channel] - means[channels + channel];
      w[0] = 1.f / (1.f + expf(-difference));
      w[1] = 1.f / (1.f + expf(difference));
    } else {
      w[0] = joint(channel);
      w[1] = joint(channels + channel);
    }
  }
};

template <class T>
struct FuseMeans {
  using Element = T;
  static constexpr int kInputs = 2, kSums = 2;
  Maps maps;
  const T* inputs[2];  // y1, y2
  float* means;

  __device__ __forceinline__ void accumulate(const float (&in)[2], float (&sum)[2]) const {
    sum[0] += in[0];
    sum[1] += in[1];
  }
  __device__ __forceinline__ void finish(int64_t image, int64_t channel,
                                         const float (&sum)[2]) const {
    float* const own = means + 2 * image * maps.channels + channel;
    own[0] = sum[0] / maps.pixels;
    own[maps.channels] = sum[1] / maps.pixels;
  }
};

template <class T>
struct FuseOutput {
  using Element = T;
  static constexpr int kInputs = 2, kOutputs = 1, kFactors = 2;
  static constexpr int kShared = 2 * channel_passes::kWarps;
  Maps maps;
  const T* inputs[2];  // y1, y2
  T* outputs[1];
  const float* means;
  bool pairwise;

  __device__ __forceinline__ FuseSoftmax prepare(int64_t image, float* shared) const {
    return {means + 2 * image * maps.channels, maps, pairwise, shared};
  }
  __device__ __forceinline__ void factors(int64_t, int64_t channel, const FuseSoftmax& softmax,
                                          bool, float (&of)[2]) const {
    softmax.weights(channel, of);
  }
  __device__ __forceinline__ void combine(const float (&in)[2], const float (&of)[2],
                                          float (&out)[1]) const {
    out[0] = in[0] * of[0] + in[1] * of[1];
  }
};

template <class T>
struct FuseGradientSums {
  using Element = T;
  static constexpr int kInputs = 3, kSums = 2;
  Maps maps;
  const T* inputs[3];  // grad_out, y1, y2
  float* products;

  __device__ __forceinline__ void accumulate(const float (&in)[3], float (&sum)[2]) const {
    sum[0] += in[0] * in[1];
    sum[1] += in[0] * in[2];
  }
  __device__ __forceinline__ void finish(int64_t image, int64_t channel,
                                         const float (&sum)[2]) const {
    float* const own = products + 2 * image * maps.channels + channel;
    own[0] = sum[0];
    own[maps.channels] = sum[1];
  }
};

template <class T>
struct FuseGradient {
  using Element = T;
  static constexpr int kInputs = 1, kOutputs = 2, kFactors = 4;
  static constexpr int kShared = 3 * channel_passes::kWarps;
  struct Prepared {
    FuseSoftmax softmax;
    float total;  // joint: t
  };
  Maps maps;
  const T* inputs[1];  // grad_out
  T* outputs[2];
  const float* means;
  const float* products;
  bool pairwise;

  __device__ __forceinline__ Prepared prepare(int64_t image, float* shared) const {
    const FuseSoftmax softmax(means + 2 * image * maps.channels, maps, pairwise, shared);
    float sum[1] = {};
    if (!pairwise) {
      const float* const own = products + 2 * image * maps.channels;
      for (int64_t i = threadIdx.x; i < 2 * maps.channels; i += channel_passes::kThreads) {
        sum[0] += softmax.joint(i) * own[i];
      }
      channel_passes::block_sums(sum, shared + 2 * channel_passes::kWarps);
    }
    return {softmax, sum[0]};
  }
  __device__ __forceinline__ void factors(int64_t image, int64_t channel, const Prepared& prepared,
                                          bool, float (&of)[4]) const {
    const float* const own = products + 2 * image * maps.channels + channel;
    const float d[2] = {own[0], own[maps.channels]};
    float w[2];
    prepared.softmax.weights(channel, w);
    const float total = pairwise ? w[0] * d[0] + w[1] * d[1] : prepared.total;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      of[i] = w[i];
      of[2 + i] = w[i] * (d[i] - total) / maps.pixels;
    }
  }
  __device__ __forceinline__ void combine(const float (&in)[1], const float (&of)[4],
                                          float (&out)[2]) const {
    out[0] = in[0] * of[0] + of[2];
    out[1] = in[0] * of[1] + of[3];
  }
};

}  // namespace

cudaError_t channel_fuse_forward(const void* y1, const void* y2, void* out, float* means,
                                 const ChannelFuseShape& shape, DType dtype, cudaStream_t stream) {
  return channel_passes::with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const T *const a = static_cast<const T*>(y1), *const b = static_cast<const T*>(y2);
    return channel_passes::run(
        FuseMeans<T>{shape.maps, {a, b}, means},
        FuseOutput<T>{shape.maps, {a, b}, {static_cast<T*>(out)}, means, shape.pairwise}, stream);
  });
}

cudaError_t channel_fuse_backward(const void* grad_out, const void* y1, const void* y2,
                                  const float* means, float* products, void* grad_y1, void* grad_y2,
                                  const ChannelFuseShape& shape, DType dtype, cudaStream_t stream) {
  return channel_passes::with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const T* const grad = static_cast<const T*>(grad_out);
    return channel_passes::run(
        FuseGradientSums<T>{
            shape.maps, {grad, static_cast<const T*>(y1), static_cast<const T*>(y2)}, products},
        FuseGradient<T>{shape.maps,
                        {grad},
                        {static_cast<T*>(grad_y1), static_cast<T*>(grad_y2)},
                        means,
                        products,
                        shape.pairwise},
        stream);
  });
}

}  // namespace kernelpose::cuda
