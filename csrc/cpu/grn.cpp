// Global response normalisation on the CPU: two passes over each image, which the second finds in
// the cache.
#include "grn.h"

#include <cmath>

#include "channel_passes.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

// 1 / m of an image.
template <class T>
inline T inverse_mean(const GrnShape& shape, const T* norms) {
  const int64_t channels = shape.maps.channels;
  return T(1) / (sum_numbers(norms, channels) / T(channels) + T(shape.eps));
}

template <class Element>
struct Forward {
  using T = Compute<Element>;
  const GrnShape& shape;
  const Element* x;
  const T* gamma;
  const T* beta;
  Element* out;
  T* norms;

  void reduce(int64_t image, int64_t first, int64_t count) const {
    T* const own = norms + image * shape.maps.channels + first;
    sum_over_pixels<1, 1, Element>(shape.maps, {x + image * shape.maps.image()}, first, count,
                                   {own},
                                   [](const auto& in, auto& sum) { sum[0] += in[0] * in[0]; });
    for (int64_t c = 0; c < count; ++c) own[c] = std::sqrt(own[c]);
  }

  T prepare(int64_t image) const {
    return inverse_mean(shape, norms + image * shape.maps.channels);
  }

  void apply(int64_t image, T inverse, int64_t first, int64_t count) const {
    const T* const own = norms + image * shape.maps.channels + first;
    alignas(kVectorBytes) T scale[kChannelBlock];
    for (int64_t c = 0; c < count; ++c) scale[c] = T(1) + gamma[first + c] * (own[c] * inverse);
    const int64_t at = image * shape.maps.image();
    scale_channels<1, 1, 2, Element>(
        shape.maps, {x + at}, {out + at}, first, count, {scale, beta + first},
        [](const auto& in, const auto& f, auto& result) { result[0] = in[0] * f[0] + f[1]; });
  }
};

template <class Element>
struct Backward {
  using T = Compute<Element>;
  struct Prepared {
    T inverse;  // 1 / m
    T shared;   // sum over channels of (a g) / (m^2 C)
  };
  const GrnShape& shape;
  const Element* grad_out;
  const Element* x;
  const T* gamma;
  const T* norms;
  T* sums;
  Element* grad_x;

  // Row of an image in the part-th of the sums.
  T* sum(int part, int64_t image) const {
    return sums + (part * shape.maps.batch + image) * shape.maps.channels;
  }

  void reduce(int64_t image, int64_t first, int64_t count) const {
    const int64_t at = image * shape.maps.image();
    sum_over_pixels<2, 2, Element>(shape.maps, {grad_out + at, x + at}, first, count,
                                   {sum(0, image) + first, sum(1, image) + first},
                                   [](const auto& in, auto& sum) {
                                     sum[0] += in[0] * in[1];
                                     sum[1] += in[0];
                                   });
  }

  Prepared prepare(int64_t image) const {
    const T* const g = norms + image * shape.maps.channels;
    const T* const s = sum(0, image);
    const T inverse = inverse_mean(shape, g);
    T total = 0;
    for (int64_t c = 0; c < shape.maps.channels; ++c) total += gamma[c] * s[c] * g[c];
    return {inverse, total * inverse * inverse / T(shape.maps.channels)};
  }

  void apply(int64_t image, Prepared prepared, int64_t first, int64_t count) const {
    const auto [inverse, shared] = prepared;
    const T* const g = norms + image * shape.maps.channels + first;
    const T* const s = sum(0, image) + first;
    T* const grad_gamma = sum(2, image) + first;
    alignas(kVectorBytes) T of_grad[kChannelBlock], of_x[kChannelBlock];
    for (int64_t c = 0; c < count; ++c) {
      const T scale = gamma[first + c];
      of_grad[c] = T(1) + scale * (g[c] * inverse);
      of_x[c] = g[c] == T(0) ? T(0) : (scale * s[c] * inverse - shared) / g[c];
      grad_gamma[c] = s[c] * (g[c] * inverse);
    }
    const int64_t at = image * shape.maps.image();
    scale_channels<2, 1, 2, Element>(shape.maps, {grad_out + at, x + at}, {grad_x + at}, first,
                                     count, {of_grad, of_x},
                                     [](const auto& in, const auto& f, auto& result) {
                                       result[0] = in[0] * f[0] + in[1] * f[1];
                                     });
  }
};

}  // namespace

void grn_forward(const void* x, const void* gamma, const void* beta, void* out, void* norms,
                 const GrnShape& shape, DType dtype, int threads) {
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    using T = Compute<Element>;
    run_channel_passes(shape.maps, threads,
                       Forward<Element>{shape, static_cast<const Element*>(x),
                                        static_cast<const T*>(gamma), static_cast<const T*>(beta),
                                        static_cast<Element*>(out), static_cast<T*>(norms)});
  });
}

void grn_backward(const void* grad_out, const void* x, const void* gamma, const void* norms,
                  void* sums, void* grad_x, const GrnShape& shape, DType dtype, int threads) {
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    using T = Compute<Element>;
    run_channel_passes(shape.maps, threads,
                       Backward<Element>{shape, static_cast<const Element*>(grad_out),
                                         static_cast<const Element*>(x),
                                         static_cast<const T*>(gamma), static_cast<const T*>(norms),
                                         static_cast<T*>(sums), static_cast<Element*>(grad_x)});
  });
}

}  // namespace kernelpose::cpu::KP_ISA
