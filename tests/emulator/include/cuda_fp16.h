// Stand-in for CUDA's header of the same name: IEEE binary16, rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

namespace kernelpose::emulator {

inline uint16_t half_bits(float value) {
  const uint32_t bits = kp_bits<uint32_t>(value), sign = bits >> 16 & 0x8000,
                 magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;          // NaN, as the hardware writes it
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                       // subnormal: units of 2^-24
    return sign | uint16_t(lrintf(kp_bits<float>(magnitude) * 0x1p24f));
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return sign | uint16_t((magnitude - (112u << 23) + 0xfff + odd) >> 13);
}

inline float half_value(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31,
                 fraction = bits & 0x3ff;
  if (exponent == 0) return kp_bits<float>(sign | kp_bits<uint32_t>(float(fraction) * 0x1p-24f));
  return kp_bits<float>(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

}  // namespace kernelpose::emulator

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float value) : bits(kernelpose::emulator::half_bits(value)) {}
  operator float() const { return kernelpose::emulator::half_value(bits); }
};
using half = __half;

struct __align__(4) __half2 {
  __half x, y;
};
using half2 = __half2;

inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(uint16_t bits) { return kp_bits<__half>(bits); }
