// Vectors of the instruction set at hand, through the vector extensions that GCC and Clang share.
// Everything lives in the namespace of one instruction set: an inline function shared between two
// would be linked once, and might be the one that this machine cannot run.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernelpose/dtype.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace kernelpose::cpu::KP_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UintVector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t ShortVector __attribute__((vector_size(kVectorBytes / 2)));  // as many lanes

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatVector;
};
template <>
struct VectorOf<double> {
  using type = DoubleVector;
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

template <class T>
inline Vector<T> load(const T* p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
inline void store(T* p, Vector<T> v) {
  std::memcpy(p, &v, sizeof(v));
}

template <class T>
inline Vector<T> broadcast(T x) {
  return x - Vector<T>{};  // x - 0 is x, signed zeros included
}

// The larger, and b where one is not a number.
template <class V>
inline V maximum(V a, V b) {
#ifdef __AVX512F__  // GCC 12 makes two instructions of the line below, and warns of _mm512_max_ps.
  if constexpr (std::is_same_v<V, FloatVector>) {
    return (FloatVector)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
  }
#endif
  return a > b ? a : b;
}

// Combines all lanes by halving: log2(lanes) dependent steps, not one a lane.
template <class V, class Combine, int... I>
inline V fold_lanes(V v, Combine combine, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  if constexpr (n >= 16) v = combine(v, __builtin_shufflevector(v, v, ((I + 8) % n)...));
  if constexpr (n >= 8) v = combine(v, __builtin_shufflevector(v, v, ((I + 4) % n)...));
  if constexpr (n >= 4) v = combine(v, __builtin_shufflevector(v, v, ((I + 2) % n)...));
  return combine(v, __builtin_shufflevector(v, v, ((I + 1) % n)...));
}

template <class T>
inline T reduce_sum(Vector<T> v) {
  const auto add = [](Vector<T> a, Vector<T> b) { return a + b; };
  return fold_lanes(v, add, std::make_integer_sequence<int, kWidth<T>>{})[0];
}

template <class T>
inline T reduce_maximum(Vector<T> v) {
  return fold_lanes(v, maximum<Vector<T>>, std::make_integer_sequence<int, kWidth<T>>{})[0];
}

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// 2^x to 1 ULP for x <= 0 and a little above, never less than 2^-126: 2^n 2^r with n = round(x),
// |r| <= 1/2, and the Chebyshev polynomial of degree 6 of 2^r, whose own error is 3e-9. kRough: to
// 1e-4, for results of fewer digits than that.
template <bool kRough = false>
inline FloatVector power_of_two(FloatVector x) {
  x = maximum(broadcast(-126.0f), x);  // in this order it keeps NaN
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits; 127 is the exponent's
  // bias.
  const FloatVector shifter = broadcast(12582912.0f + 127.0f);
  const FloatVector shifted = x + shifter;
  const FloatVector r = x - (shifted - shifter);
  FloatVector p;
  if constexpr (kRough) {
    p = broadcast(5.517166802e-2f);
    p = p * r + 2.426111221e-1f;
    p = p * r + 6.932609857e-1f;
    p = p * r + 9.999280735e-1f;
  } else {
    p = broadcast(1.546144472e-4f);
    p = p * r + 1.340042818e-3f;
    p = p * r + 9.618056678e-3f;
    p = p * r + 5.550327227e-2f;
    p = p * r + 2.402265092e-1f;
    p = p * r + 6.931472067e-1f;
    p = p * r + 1.0f;
  }
  IntVector exponent;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  exponent <<= 23;
  FloatVector power;
  std::memcpy(&power, &exponent, sizeof(power));
  return p * power;
}

inline DoubleVector power_of_two(DoubleVector x) {
  DoubleVector y = x;
  for (int i = 0; i < kWidth<double>; ++i) y[i] = __builtin_exp2(x[i]);
  return y;
}

// What 2 to its negative does not overflow: t log2(e), but not below the least exponent; NaN stays.
template <class V>
inline V sigmoid_exponent(V t) {
  using T = std::decay_t<decltype(t[0])>;
  return maximum(V{} - (sizeof(T) == 4 ? 126 : 1022), t * T(kLog2E));
}

// 1 / (1 + e^-t), without overflow and with NaN kept.
template <class V>
inline V sigmoid(V t) {
  return 1 / (1 + power_of_two(-sigmoid_exponent(t)));
}
inline float sigmoid(float t) { return sigmoid(broadcast(t))[0]; }
inline double sigmoid(double t) { return sigmoid(broadcast(t))[0]; }

// The same to 2^-12, for results of fewer digits than that.
inline FloatVector rough_sigmoid(FloatVector t) {
  const FloatVector sum = 1 + power_of_two<true>(-sigmoid_exponent(t));
#ifdef __AVX512F__
  return (FloatVector)_mm512_maskz_rcp14_ps(0xffff, (__m512)sum);
#else
  return 1 / sum;
#endif
}

inline float logarithm2(float x) { return __builtin_log2f(x); }
inline double logarithm2(double x) { return __builtin_log2(x); }

// Element types of tensors and the type they are computed in.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
template <class Element>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class Element>
using Compute = typename ComputeOf<Element>::type;

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float to_compute(float x) { return x; }
inline double to_compute(double x) { return x; }
inline float to_compute(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_compute(Half x) {
#ifdef __F16C__
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // The exponent is rebased by a multiplication, which handles subnormal numbers as well.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
#endif
}

inline void from_compute(float x, float& out) { out = x; }
inline void from_compute(double x, double& out) { out = x; }
inline void from_compute(float x, BFloat16& out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  out.bits = static_cast<uint16_t>((x == x ? rounded : bits | 0x400000) >> 16);
}
inline void from_compute(float x, Half& out) {
#ifdef __F16C__
  out.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds past the largest half
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: let an addition do the rounding
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
#endif
}

// `count` neighbouring elements, times `factor`, to the compute type.
template <class Element>
inline void read_row(const Element* from, int count, Compute<Element> factor,
                     Compute<Element>* to) {
  int i = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Element, Half>) {
    for (; i + 16 <= count; i += 16) {
      const auto half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      _mm512_storeu_ps(to + i, _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(factor)));
    }
  }
#elif defined(__F16C__)
  if constexpr (std::is_same_v<Element, Half>) {
    for (; i + 8 <= count; i += 8) {
      const auto half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_ps(to + i, _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(factor)));
    }
  }
#endif
  for (; i < count; ++i) to[i] = to_compute(from[i]) * factor;
}

// The inverse: `count` numbers, times `factor`, rounded to the element type.
template <class Element>
inline void write_row(const Compute<Element>* from, int count, Compute<Element> factor,
                      Element* to) {
  int i = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Element, Half>) {
    for (; i + 16 <= count; i += 16) {
      const auto x = _mm512_mul_ps(_mm512_loadu_ps(from + i), _mm512_set1_ps(factor));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
  }
#elif defined(__F16C__)
  if constexpr (std::is_same_v<Element, Half>) {
    for (; i + 8 <= count; i += 8) {
      const auto x = _mm256_mul_ps(_mm256_loadu_ps(from + i), _mm256_set1_ps(factor));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
  }
#endif
  for (; i < count; ++i) from_compute(from[i] * factor, to[i]);
}

// kWidth neighbouring elements as a vector of the compute type. GCC 12 splits conversions between
// 16 and 32 bits in halves: hence the intrinsics.
template <class Element>
inline Vector<Compute<Element>> load_elements(const Element* from) {
  using T = Compute<Element>;
  Vector<T> wide;
  if constexpr (std::is_same_v<Element, T>) {
    wide = load(from);
  } else if constexpr (std::is_same_v<Element, BFloat16>) {
#if defined(__AVX512F__)
    const auto narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const auto bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
#elif defined(__AVX2__)
    const auto narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const auto bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16);
#else
    ShortVector narrow;
    std::memcpy(&narrow, from, sizeof(narrow));
    const auto bits = __builtin_convertvector(narrow, UintVector) << 16;
#endif
    std::memcpy(&wide, &bits, sizeof(wide));
  } else {
    alignas(kVectorBytes) T numbers[kWidth<T>];
    read_row(from, kWidth<T>, T(1), numbers);
    wide = load(numbers);
  }
  return wide;
}

// The inverse: the results of arithmetic, rounded to the element type.
template <class Element>
inline void store_elements(Element* to, Vector<Compute<Element>> v) {
  using T = Compute<Element>;
  if constexpr (std::is_same_v<Element, T>) {
    store(to, v);
  } else if constexpr (std::is_same_v<Element, BFloat16>) {
    // Half of the last place is added, less where that is even; upper halves are what stays. A NaN
    // that arithmetic left is quiet: its upper half is a NaN, too.
#if defined(__AVX512F__)
    const __m512i bits = (__m512i)v;
    const auto odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i half =
        _mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
    const auto number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
    const __m512i upper = _mm512_set_epi64(0, 0, 0, 0, 0x001f001d001b0019, 0x0017001500130011,
                                           0x000f000d000b0009, 0x0007000500030001);
    const __m512i rounded = _mm512_mask_add_epi32(bits, number, bits, half);
    const __m512i words = _mm512_permutexvar_epi16(upper, rounded);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(words));
#else
    UintVector bits;
    std::memcpy(&bits, &v, sizeof(bits));
    const UintVector high = (v == v ? bits + (0x7fff + ((bits >> 16) & 1)) : bits) >> 16;
    const ShortVector narrow = __builtin_convertvector(high, ShortVector);
    std::memcpy(to, &narrow, sizeof(narrow));
#endif
  } else {
    alignas(kVectorBytes) T numbers[kWidth<T>];
    store(numbers, v);
    write_row(numbers, kWidth<T>, T(1), to);
  }
}

template <class V, int... I>
inline V interleave_low(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, ((I / 2) + (I % 2) * n)...);
}

template <class V, int... I>
inline V interleave_high(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (n / 2 + (I / 2) + (I % 2) * n)...);
}

// Transposes a square of kWidth vectors in registers: log2(kWidth) perfect shuffles of the rows.
template <class T>
inline void transpose_square(Vector<T> (&rows)[kWidth<T>]) {
  constexpr int n = kWidth<T>;
  using Lanes = std::make_integer_sequence<int, n>;
#pragma GCC unroll 4
  for (int stage = 1; stage < n; stage *= 2) {
    Vector<T> mixed[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      mixed[2 * i] = interleave_low(rows[i], rows[i + n / 2], Lanes{});
      mixed[2 * i + 1] = interleave_high(rows[i], rows[i + n / 2], Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = mixed[i];
  }
}

}  // namespace kernelpose::cpu::KP_ISA
