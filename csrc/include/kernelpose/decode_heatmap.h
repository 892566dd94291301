// What decode_heatmap computes around its loops: borders of the blur, the refinement of a peak, and
// the way back to the image. The definition is kernelpose/reference/decode_heatmap.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernelpose/host_device.h"

namespace kernelpose {

// In the order of DECODE_MODES.
enum class DecodeMode : int { kMmpose1, kMmpose0, kTransformers, kDark, kShift, kArgmax };

constexpr int kMaxTaps = 63;
constexpr int kNear = 5;  // a peak and two pixels on each side of it, which DARK asks for

struct Point {
  float x, y;
};

// Rows and columns of a map.
struct Window {
  int top, left, height, width;
};

KP_HOST_DEVICE inline int clamped(int i, int size) { return i < 0 ? 0 : i < size ? i : size - 1; }

struct DecodeHeatmap {
  int64_t persons;
  int64_t joints;
  int height, width;
  DecodeMode mode;
  bool udp;
  int taps;  // of the blur along an axis, odd
  float weights[kMaxTaps];

  KP_HOST_DEVICE int64_t maps() const { return persons * joints; }
  KP_HOST_DEVICE int pixels() const { return height * width; }
  KP_HOST_DEVICE int radius() const { return taps / 2; }
  // Whether the blurred map is rescaled to the maximum that the map had.
  KP_HOST_DEVICE bool rescales() const {
    return mode == DecodeMode::kMmpose1 || mode == DecodeMode::kDark;
  }
  // Whether the refinement is a Newton step on the blurred logarithms.
  KP_HOST_DEVICE bool blurs() const { return mode < DecodeMode::kShift; }
  // How far from the peak a refinement looks.
  KP_HOST_DEVICE int reach() const { return mode == DecodeMode::kDark ? 2 : 1; }

  // What of the map a refinement of the peak at x, y looks at.
  KP_HOST_DEVICE Window around(int x, int y) const {
    const int top = clamped(y - reach(), height), left = clamped(x - reach(), width);
    return {top, left, clamped(y + reach(), height) - top + 1,
            clamped(x + reach(), width) - left + 1};
  }

  // Which of `size` rows or columns the blur reads at `i`, which may lie outside; -1: none, zero.
  KP_HOST_DEVICE int source(int i, int size) const {
    if (i >= 0 && i < size) return i;
    if (rescales()) return -1;
    if (size == 1) return 0;
    if (mode == DecodeMode::kMmpose0) {  // gfedcb|abcdefgh|gfedcba
      const int period = 2 * size - 2;
      const int turned = ((i % period) + period) % period;
      return turned < size ? turned : period - turned;
    }
    const int period = 2 * size;  // dcba|abcdefgh|hgfe
    const int turned = ((i % period) + period) % period;
    return turned < size ? turned : period - 1 - turned;
  }

  // The logarithm's argument; NaN stays.
  KP_HOST_DEVICE float clipped(float value) const {
    const float low = mode == DecodeMode::kDark ? 1e-10f : 1e-3f;
    if (value < low) return low;
    return mode != DecodeMode::kDark && value > 50.0f ? 50.0f : value;
  }

  // Whether no rescaling lets the clipping act on a blurred value. The blur's maximum is neither
  // below the blurred peak nor above the peak, so the factor lies between 1 and `factor`, that of
  // the blurred peak. Where this holds for all that the refinement reads, any factor shifts all
  // logarithms alike and moves the step by nothing: the rest of the blur is not needed.
  KP_HOST_DEVICE bool never_clipped(float value, float factor) const {
    return clipped(value) == value && clipped(value * factor) == value * factor;
  }
};

KP_HOST_DEVICE inline float finite_or_zero(float x) {
  return x - x == 0.0f ? x : 0.0f;  // infinity and NaN give NaN
}

// -H^-1 g in float64, as numpy does it: a flat peak is nearly singular.
KP_HOST_DEVICE inline Point newton_step(float dx, float dy, float dxx, float dxy, float dyy,
                                        double damping) {
  const double xx = dxx + damping, yy = dyy + damping, xy = dxy, gx = dx, gy = dy;
  const double determinant = xx * yy - xy * xy;
  return {static_cast<float>((xy * gy - yy * gx) / determinant),
          static_cast<float>((xy * gx - xx * gy) / determinant)};
}

// The step from the peak at x, y, in pixels. at(dx, dy) is the map beside the peak, edges repeated:
// the logarithm of its blur, or for `shift` the map itself.
template <class At>
KP_HOST_DEVICE Point refinement(const DecodeHeatmap& problem, int x, int y, const At& at) {
  const int width = problem.width, height = problem.height;
  Point step = {0.0f, 0.0f};
  if (problem.mode == DecodeMode::kShift) {  // the bounds are mmpose's
    const float right = at(1, 0), left = at(-1, 0), below = at(0, 1), above = at(0, -1);
    if (x > 1 && x < width - 1 && y > 0) step.x = 0.25f * ((right > left) - (right < left));
    if (y > 1 && y < height - 1 && x > 0) step.y = 0.25f * ((below > above) - (below < above));
  } else if (problem.mode == DecodeMode::kDark) {
    if (x > 1 && x < width - 2 && y > 1 && y < height - 2) {
      step = newton_step(0.5f * (at(1, 0) - at(-1, 0)), 0.5f * (at(0, 1) - at(0, -1)),
                         0.25f * (at(2, 0) - 2.0f * at(0, 0) + at(-2, 0)),
                         0.25f * (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)),
                         0.25f * (at(0, 2) - 2.0f * at(0, 0) + at(0, -2)), 0.0);
    }
  } else if (problem.blurs()) {
    step = newton_step(0.5f * (at(1, 0) - at(-1, 0)), 0.5f * (at(0, 1) - at(0, -1)),
                       at(1, 0) - 2.0f * at(0, 0) + at(-1, 0),
                       0.5f * (at(1, 1) - at(1, 0) - at(0, 1) + 2.0f * at(0, 0) - at(-1, 0) -
                               at(0, -1) + at(-1, -1)),
                       at(0, 1) - 2.0f * at(0, 0) + at(0, -1), 1.1920928955078125e-7);
  }
  return {finite_or_zero(step.x), finite_or_zero(step.y)};
}

// Whether a maximum, which may be NaN, is that of a map with a peak.
KP_HOST_DEVICE inline bool is_peak(float maximum) {
  return maximum > 0.0f && maximum - maximum == 0.0f;
}

struct DecodedPoints {
  const float* centers;  // (persons, 2), or nullptr to stay on the map
  const float* scales;   // (persons, 2), width and height
  float* keypoints;      // (persons, joints, 2)
  float* scores;         // (persons, joints)

  // location: where the map has a peak.
  KP_HOST_DEVICE void write(const DecodeHeatmap& problem, int64_t map, float maximum,
                            Point location) const {
    if (!is_peak(maximum)) location = {-1.0f, -1.0f};
    if (centers) {
      const float *center = centers + 2 * (map / problem.joints),
                  *scale = scales + 2 * (map / problem.joints);
      const int less = problem.udp ? 1 : 0;
      location.x = location.x * (scale[0] / static_cast<float>(problem.width - less)) +
                   (center[0] - scale[0] / 2);
      location.y = location.y * (scale[1] / static_cast<float>(problem.height - less)) +
                   (center[1] - scale[1] / 2);
    }
    keypoints[2 * map] = location.x;
    keypoints[2 * map + 1] = location.y;
    scores[map] = finite_or_zero(maximum);
  }
};

}  // namespace kernelpose
