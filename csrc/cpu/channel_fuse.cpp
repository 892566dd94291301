// CRU's fusion on the CPU: two passes over each image, which the second finds in the cache.
#include "channel_fuse.h"

#include "channel_passes.h"

namespace kernelpose::cpu::KP_ISA {
namespace {

// The first `count` numbers at p, `rest` in the other lanes.
template <class T>
inline Vector<T> load_some(const T* p, int64_t count, T rest) {
  if (count >= kWidth<T>) return load(p);
  Vector<T> v = broadcast(rest);
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

// e^x to a few ULP for x <= 0, never less than about the smallest normal number. n ln 2 is taken
// off in two parts, the first times n without rounding: the rounding of x log2(e) would grow with
// x.
template <class T>
inline Vector<T> exponential(Vector<T> x) {
  constexpr bool kDouble = sizeof(T) == 8;
  constexpr T shifter = kDouble ? T(6755399441055744.0) : T(12582912.0);  // rounds to an integer
  x = maximum(broadcast(kDouble ? T(-700) : T(-87)), x);                  // in this order keeps NaN
  const Vector<T> n = (x * T(kLog2E) + shifter) - shifter;
  const Vector<T> rest = (x - n * T(0.693359375)) + n * T(2.1219444005469057e-4);
  return power_of_two(rest * T(kLog2E)) * power_of_two(n);
}

// The weights of an image's channels.
template <class T>
struct Softmax {
  using V = Vector<T>;
  bool pairwise;
  T largest = 0, inverse = 1;  // joint: the largest mean, 1 / sum of exponentials

  Softmax(const ChannelFuseShape& shape, const T* means) : pairwise(shape.pairwise) {
    if (pairwise) return;
    constexpr int n = kWidth<T>;
    const int64_t count = 2 * shape.maps.channels;
    V top = broadcast(means[0]), sum = {};
    for (int64_t i = 0; i < count; i += n) {
      top = maximum(top, load_some(means + i, count - i, means[0]));
    }
    largest = reduce_maximum<T>(top);
    int64_t i = 0;
    for (; i + n <= count; i += n) sum += beside_largest(load(means + i));
    T total = reduce_sum<T>(sum);
    for (; i < count; ++i) total += beside_largest(broadcast(means[i]))[0];
    inverse = T(1) / total;
  }

  V beside_largest(V mean) const { return exponential<T>(mean - largest); }

  // (w1, w2) of some channels' means.
  void weights(V m1, V m2, V& w1, V& w2) const {
    if (!pairwise) {
      w1 = beside_largest(m1) * inverse;
      w2 = beside_largest(m2) * inverse;
      return;
    }
    const V top = maximum(m1, m2);
    w1 = exponential<T>(m1 - top);
    w2 = exponential<T>(m2 - top);
    const V one = w1 + w2;
    w1 /= one;
    w2 /= one;
  }
};

// An image's row of y1 in means or products; that of y2 follows.
template <class T>
inline T* rows(T* of, const Maps& maps, int64_t image) {
  return of + 2 * image * maps.channels;
}

template <class Element>
struct Forward {
  using T = Compute<Element>;
  using V = Vector<T>;
  const ChannelFuseShape& shape;
  const Element* y1;
  const Element* y2;
  Element* out;
  T* means;

  void reduce(int64_t image, int64_t first, int64_t count) const {
    const Maps& maps = shape.maps;
    const int64_t at = image * maps.image();
    T* const m1 = rows(means, maps, image) + first;
    T* const m2 = m1 + maps.channels;
    sum_over_pixels<2, 2, Element>(maps, {y1 + at, y2 + at}, first, count, {m1, m2},
                                   [](const auto& in, auto& sum) {
                                     sum[0] += in[0];
                                     sum[1] += in[1];
                                   });
    const T factor = T(1) / T(maps.pixels);
    for (int64_t c = 0; c < count; ++c) {
      m1[c] *= factor;
      m2[c] *= factor;
    }
  }

  Softmax<T> prepare(int64_t image) const { return {shape, rows(means, shape.maps, image)}; }

  void apply(int64_t image, const Softmax<T>& softmax, int64_t first, int64_t count) const {
    const Maps& maps = shape.maps;
    const T* const m1 = rows(means, maps, image) + first;
    const T* const m2 = m1 + maps.channels;
    alignas(kVectorBytes) T of_y1[kChannelBlock], of_y2[kChannelBlock];
    for (int64_t c = 0; c < count; c += kWidth<T>) {
      V w1, w2;
      softmax.weights(load_some(m1 + c, count - c, T(0)), load_some(m2 + c, count - c, T(0)), w1,
                      w2);
      store(of_y1 + c, w1);
      store(of_y2 + c, w2);
    }
    const int64_t at = image * maps.image();
    scale_channels<2, 1, 2, Element>(maps, {y1 + at, y2 + at}, {out + at}, first, count,
                                     {of_y1, of_y2},
                                     [](const auto& in, const auto& w, auto& result) {
                                       result[0] = in[0] * w[0] + in[1] * w[1];
                                     });
  }
};

template <class Element>
struct Backward {
  using T = Compute<Element>;
  using V = Vector<T>;
  struct Prepared {
    Softmax<T> softmax;
    T total;  // joint: t
  };
  const ChannelFuseShape& shape;
  const Element* grad_out;
  const Element* y1;
  const Element* y2;
  const T* means;
  T* products;
  Element* grad_y1;
  Element* grad_y2;

  void reduce(int64_t image, int64_t first, int64_t count) const {
    const Maps& maps = shape.maps;
    const int64_t at = image * maps.image();
    T* const d1 = rows(products, maps, image) + first;
    sum_over_pixels<3, 2, Element>(maps, {grad_out + at, y1 + at, y2 + at}, first, count,
                                   {d1, d1 + maps.channels}, [](const auto& in, auto& sum) {
                                     sum[0] += in[0] * in[1];
                                     sum[1] += in[0] * in[2];
                                   });
  }

  Prepared prepare(int64_t image) const {
    const Maps& maps = shape.maps;
    const T* const m = rows(means, maps, image);
    const T* const d = rows(products, maps, image);
    Prepared prepared = {Softmax<T>(shape, m), T(0)};
    if (shape.pairwise) return prepared;
    V sum = {};
    for (int64_t i = 0; i < 2 * maps.channels; i += kWidth<T>) {
      const int64_t left = 2 * maps.channels - i;
      const V weight = prepared.softmax.beside_largest(load_some(m + i, left, m[0]));
      sum += weight * load_some(d + i, left, T(0));
    }
    prepared.total = reduce_sum<T>(sum) * prepared.softmax.inverse;
    return prepared;
  }

  void apply(int64_t image, const Prepared& prepared, int64_t first, int64_t count) const {
    const Maps& maps = shape.maps;
    const T *const m1 = rows(means, maps, image) + first, *const m2 = m1 + maps.channels;
    const T *const d1 = rows(products, maps, image) + first, *const d2 = d1 + maps.channels;
    const T factor = T(1) / T(maps.pixels);
    alignas(kVectorBytes) T of_grad1[kChannelBlock], of_grad2[kChannelBlock];
    alignas(kVectorBytes) T shift1[kChannelBlock], shift2[kChannelBlock];
    for (int64_t c = 0; c < count; c += kWidth<T>) {
      const auto some = [&](const T* p) { return load_some(p + c, count - c, T(0)); };
      V w1, w2;
      prepared.softmax.weights(some(m1), some(m2), w1, w2);
      const V total = shape.pairwise ? w1 * some(d1) + w2 * some(d2) : broadcast(prepared.total);
      store(of_grad1 + c, w1);
      store(of_grad2 + c, w2);
      store(shift1 + c, w1 * (some(d1) - total) * factor);
      store(shift2 + c, w2 * (some(d2) - total) * factor);
    }
    const int64_t at = image * maps.image();
    scale_channels<1, 2, 4, Element>(maps, {grad_out + at}, {grad_y1 + at, grad_y2 + at}, first,
                                     count, {of_grad1, of_grad2, shift1, shift2},
                                     [](const auto& in, const auto& f, auto& result) {
                                       result[0] = in[0] * f[0] + f[2];
                                       result[1] = in[0] * f[1] + f[3];
                                     });
  }
};

}  // namespace

void channel_fuse_forward(const void* y1, const void* y2, void* out, void* means,
                          const ChannelFuseShape& shape, DType dtype, int threads) {
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    run_channel_passes(
        shape.maps, threads,
        Forward<Element>{shape, static_cast<const Element*>(y1), static_cast<const Element*>(y2),
                         static_cast<Element*>(out), static_cast<Compute<Element>*>(means)});
  });
}

void channel_fuse_backward(const void* grad_out, const void* y1, const void* y2, const void* means,
                           void* products, void* grad_y1, void* grad_y2,
                           const ChannelFuseShape& shape, DType dtype, int threads) {
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    using T = Compute<Element>;
    run_channel_passes(
        shape.maps, threads,
        Backward<Element>{shape, static_cast<const Element*>(grad_out),
                          static_cast<const Element*>(y1), static_cast<const Element*>(y2),
                          static_cast<const T*>(means), static_cast<T*>(products),
                          static_cast<Element*>(grad_y1), static_cast<Element*>(grad_y2)});
  });
}

}  // namespace kernelpose::cpu::KP_ISA
