// What heatmap_loss computes on: the target of a joint as the product of two profiles, one an axis.
//
//             centre            "udp", "msra": a window of 3 sigma around the nearest pixel, which
//                v              may reach over the edge of the map; "unbiased": the whole map.
//   0 0 0 . - ^ - . 0 0 0 0     "msra" is centred on the nearest pixel, the others in between.
//         |first    |end
//
// All comparisons are made in the compute type, in the order of kernelpose/reference: whether a
// pixel is inside or a joint counts must not depend on the backend, and NaN must compare as there.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__) || defined(KERNELPOSE_EMULATOR)
#define KP_HOST_DEVICE __host__ __device__
#else
#define KP_HOST_DEVICE
#endif

namespace kernelpose {

enum class TargetCodec : int { kUdp = 0, kMsra = 1, kUnbiased = 2 };

struct HeatmapLossShape {
  int64_t maps;  // persons x joints, >= 1
  int height, width;
  double ratio_x, ratio_y;  // input pixels to a heatmap pixel
  double sigma;             // heatmap pixels
  TargetCodec codec;

  int64_t map_elements() const { return int64_t{1} * height * width; }
};

// At pixel i, first <= i < end: 2^(exponent * d^2) with d = (i - origin) - shift; elsewhere 0.
template <class T>
struct Profile {
  T first, end, origin, shift;
  bool reached;  // whether the window touches the map

  KP_HOST_DEVICE bool covers(T pixel) const { return pixel >= first && pixel < end; }
};

// What profiles fall below is 0: no product of two is a subnormal number, which CPUs are slow with.
constexpr int kLeastProfileExponent = -63;

template <class T>
struct Joint {
  Profile<T> x, y;
  T weight;
};

// The targets of all joints; made on the host, where what needs double is computed.
template <class T>
struct GaussianTargets {
  T ratio_x, ratio_y, width, height, radius, half, exponent;
  TargetCodec codec;

  explicit GaussianTargets(const HeatmapLossShape& shape)
      : ratio_x(T(shape.ratio_x)),
        ratio_y(T(shape.ratio_y)),
        width(T(shape.width)),
        height(T(shape.height)),
        radius(T(3 * shape.sigma)),
        half(T(std::floor((2 * (3 * shape.sigma) + 1) / 2))),
        exponent(T(-1.4426950408889634 / (2 * shape.sigma * shape.sigma))),
        codec(shape.codec) {}

  // keypoint: x and y in input pixels.
  KP_HOST_DEVICE Joint<T> joint(const T* keypoint, T visible) const {
    Joint<T> result = {profile(keypoint[0] / ratio_x, width),
                       profile(keypoint[1] / ratio_y, height), visible};
    const bool reached = result.x.reached && result.y.reached, labelled = visible >= T(0.5);
    if (labelled && !reached) result.weight *= T(0);
    if (!(labelled && reached)) result.x.end = result.y.end = T(-1);  // empty: no pixel is below
    return result;
  }

 private:
  KP_HOST_DEVICE Profile<T> profile(T center, T size) const {
    if (codec == TargetCodec::kUnbiased) {
      return {T(0), size, T(0), center, center - radius < size && center + radius + T(1) >= T(0)};
    }
    const T nearest = std::trunc(center + T(0.5));
    const T first = std::trunc(nearest - radius), end = std::trunc(nearest + radius + T(1));
    const T shift = codec == TargetCodec::kUdp ? center - nearest : T(0);
    return {first, end, first + half, shift, first < size && end >= T(0)};
  }
};

}  // namespace kernelpose
