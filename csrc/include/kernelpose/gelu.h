// The exact GELU z Phi(z), Phi being the normal distribution's, and its derivative Phi(z) +
// z phi(z), for float32 numbers or vectors of them.
//
// Phi(-a) = e^(-a^2 / 2) R(a), where R falls slowly from 1/2. With a = |z|, GELU(z) = max(z, 0) -
// a Phi(-a), which loses no digit where 1 + erf would; its derivative is D = e^(-a^2 / 2) (R(a) -
// a / sqrt(2 pi)) for z < 0 and 1 - D otherwise.
#pragma once

#include "kernelpose/host_device.h"

namespace kernelpose {

// For a > 11 both are taken at 11, where Phi(-a) is 2e-28: nothing overflows, and infinities stay.
constexpr float kGeluEnd = 11.f;
constexpr float kGeluExponent = -0.7213475204444817f;  // -log2(e) / 2: times a^2, of a power of two
constexpr float kGeluSlope = 0.3989422804014327f;      // 1 / sqrt(2 pi)
constexpr float kGeluPole = 0.3f;

// R(a) of w = a / (1 + kGeluPole a): 1/2 + w P(w), where P is the polynomial of degree 7 that has
// the smallest relative error in R for a <= 8: 4e-8. It is less than 4e-5 up to kGeluEnd.
template <class V>
KP_HOST_DEVICE inline V gelu_ratio(V w) {
  V p = w * 2.2534377421834506e-06f - 2.7525084078661166e-05f;
  p = p * w + 7.615455979248509e-05f;
  p = p * w + 2.8486025985330343e-04f;
  p = p * w - 3.8725550984963775e-04f;
  p = p * w - 1.8917707726359367e-02f;
  p = p * w + 1.3032494485378265e-01f;
  p = p * w - 3.989429175853729e-01f;
  return p * w + 0.5f;
}

}  // namespace kernelpose
