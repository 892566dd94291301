// The exact GELU and its derivative on the device: see kernelpose/gelu.h. NaN and infinities stay.
#pragma once

#include "kernelpose/gelu.h"
#include "kernelpose/ptx.cuh"

namespace kernelpose {

// What both are made of, for a = |z| up to kGeluEnd.
struct GeluTail {
  float a, power, ratio;  // power ratio = Phi(-a)

  __device__ __forceinline__ explicit GeluTail(float z) {
    a = fabsf(z) > kGeluEnd ? kGeluEnd : fabsf(z);
    power = exp2_approx(a * a * kGeluExponent);
    ratio = gelu_ratio(__fdividef(a, 1.f + kGeluPole * a));
  }
};

__device__ __forceinline__ float gelu(float z) {
  const GeluTail tail(z);
  return fmaxf(z, 0.f) - tail.a * (tail.power * tail.ratio);
}

__device__ __forceinline__ float gelu_derivative(float z) {
  const GeluTail tail(z);
  const float d = tail.power * (tail.ratio - kGeluSlope * tail.a);
  return z < 0.f ? d : 1.f - d;
}

}  // namespace kernelpose
