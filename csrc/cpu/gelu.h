// The exact GELU and its derivative in vectors, as objects that hold what their loops need. For
// float32 the GELU is right to 3 ULP for z > -1, the derivative to 1e-7, and of the tail, where
// 1 + erf has no digits left, most are there.
#pragma once

#include <cmath>

#include "kernelpose/gelu.h"
#include "simd.h"

namespace kernelpose::cpu::KP_ISA {

// Phi(-a)
inline double gelu_tail(double a) { return 0.5 * std::erfc(a * 0.7071067811865476); }

// What is added to or taken from 1 where z < 0 or z >= 0.
inline double gelu_derivative_tail(double a) {
  return gelu_tail(a) - a * 0.3989422804014327 * std::exp(-0.5 * a * a);
}

#if defined(__AVX512F__)

// A function of [0, kEnd] in float32, as a polynomial of degree 5 around each multiple of 1/4 up to
// 31/4: a permutation of two registers looks a coefficient up, and that is half the arithmetic of
// the formula below. Each goes through six values, at the roots of a Chebyshev polynomial.
struct GeluTable {
  static constexpr int kCoefficients = 6, kEntries = 32;
  static constexpr float kEnd = 7.87f;
  alignas(kVectorBytes) float of[kCoefficients][kEntries];

  explicit GeluTable(double (*function)(double)) {
    double nodes[kCoefficients], newton[kCoefficients];
    for (int i = 0; i < kCoefficients; ++i) {
      nodes[i] = 0.125 * std::cos(3.141592653589793 * (i + 0.5) / kCoefficients);
    }
    for (int entry = 0; entry < kEntries; ++entry) {
      for (int i = 0; i < kCoefficients; ++i) newton[i] = function(0.25 * entry + nodes[i]);
      for (int order = 1; order < kCoefficients; ++order) {  // divided differences
        for (int i = kCoefficients - 1; i >= order; --i) {
          newton[i] = (newton[i] - newton[i - 1]) / (nodes[i] - nodes[i - order]);
        }
      }
      double powers[kCoefficients] = {};
      for (int i = kCoefficients - 1; i >= 0; --i) {  // times (r - node), plus the next
        for (int k = kCoefficients - 1; k > 0; --k) {
          powers[k] = powers[k - 1] - nodes[i] * powers[k];
        }
        powers[0] = newton[i] - nodes[i] * powers[0];
      }
      for (int k = 0; k < kCoefficients; ++k) of[k][entry] = static_cast<float>(powers[k]);
    }
  }
};

// Its rows in registers.
class GeluPieces {
 public:
  explicit GeluPieces(const GeluTable& table) {
    for (int k = 0; k < GeluTable::kCoefficients; ++k) {
      for (int half = 0; half < 2; ++half) rows_[k][half] = _mm512_load_ps(table.of[k] + 16 * half);
    }
  }
  // a = |z| up to the table's end, and the function of it.
  FloatVector operator()(FloatVector z, FloatVector& a) const {
    a = _mm512_min_ps(_mm512_set1_ps(GeluTable::kEnd), _mm512_abs_ps(z));  // so it keeps NaN
    const FloatVector shifter = broadcast(12582912.0f);  // leaves round(4 a) in the low bits
    const FloatVector shifted = 4.0f * a + shifter;
    const FloatVector r = a - 0.25f * (shifted - shifter);
    const __m512i entry = _mm512_castps_si512(shifted);
    FloatVector p = look_up(GeluTable::kCoefficients - 1, entry);
#pragma GCC unroll 5
    for (int k = GeluTable::kCoefficients - 2; k >= 0; --k) p = p * r + look_up(k, entry);
    return p;
  }

 private:
  FloatVector look_up(int k, __m512i entry) const {
    return _mm512_permutex2var_ps(rows_[k][0], entry, rows_[k][1]);
  }
  __m512 rows_[GeluTable::kCoefficients][2];
};

inline FloatVector above_zero(FloatVector z) {
  return _mm512_max_ps(_mm512_setzero_ps(), z);  // so it keeps NaN
}

template <class T>
struct Gelu {
  GeluPieces tail{table()};

  FloatVector operator()(FloatVector z) const {
    FloatVector a;
    const FloatVector phi = tail(z, a);
    return above_zero(z) - a * phi;
  }
  static const GeluTable& table() {
    static const GeluTable made(gelu_tail);
    return made;
  }
};

template <class T>
struct GeluDerivative {
  GeluPieces tail{table()};

  FloatVector operator()(FloatVector z) const {
    FloatVector a;
    const FloatVector d = tail(z, a);
    return z < 0 ? d : 1.0f - d;
  }
  static const GeluTable& table() {
    static const GeluTable made(gelu_derivative_tail);
    return made;
  }
};

#else

// What both are made of, see kernelpose/gelu.h, for a = |z| up to kGeluEnd.
struct GeluTail {
  FloatVector a, power, ratio;  // power ratio = Phi(-a)

  explicit GeluTail(FloatVector z) {
    const FloatVector magnitude = z < 0 ? -z : z, end = broadcast(kGeluEnd);
    a = magnitude > end ? end : magnitude;  // in this order it keeps NaN
    power = power_of_two(a * a * kGeluExponent);
    ratio = gelu_ratio(a / (1.0f + kGeluPole * a));
  }
};

template <class T>
struct Gelu {
  FloatVector operator()(FloatVector z) const {
    const GeluTail tail(z);
    return maximum(z, FloatVector{}) - tail.a * (tail.power * tail.ratio);
  }
};

template <class T>
struct GeluDerivative {
  FloatVector operator()(FloatVector z) const {
    const GeluTail tail(z);
    const FloatVector d = tail.power * (tail.ratio - kGeluSlope * tail.a);
    return z < 0 ? d : 1.0f - d;
  }
};

#endif

template <>
struct Gelu<double> {
  DoubleVector operator()(DoubleVector z) const {
    DoubleVector y = z;
    for (int i = 0; i < kWidth<double>; ++i) y[i] = z[i] * gelu_tail(-z[i]);
    return y;
  }
};

template <>
struct GeluDerivative<double> {
  DoubleVector operator()(DoubleVector z) const {
    DoubleVector y = z;
    for (int i = 0; i < kWidth<double>; ++i) y[i] = gelu_derivative_tail(-z[i]);
    return y;
  }
};

}  // namespace kernelpose::cpu::KP_ISA
