// Vectors at the end of a row, of which only the first lanes exist.
#pragma once

#include "simd.h"

namespace kernelpose::cpu::KP_ISA {

// The first `count` lanes of a vector; the others are 0.
template <class Element>
inline Vector<Compute<Element>> load_part(const Element* from, int count) {
  using T = Compute<Element>;
  if (count >= kWidth<T>) return load_elements(from);
#if defined(__AVX512F__)
  const unsigned mask = (1u << count) - 1;
  if constexpr (std::is_same_v<Element, float>) {
    const auto lanes = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
    Vector<T> v;
    std::memcpy(&v, &lanes, sizeof(v));
    return v;
  } else if constexpr (sizeof(Element) == 2) {
    Element whole[kWidth<T>];
    const auto lanes = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from);
    std::memcpy(whole, &lanes, sizeof(whole));
    return load_elements(whole);
  }
#endif
  alignas(kVectorBytes) T lanes[kWidth<T>] = {};
  read_row(from, count, T(1), lanes);
  return load(lanes);
}

template <class Element>
inline void store_part(Element* to, Vector<Compute<Element>> values, int count) {
  using T = Compute<Element>;
  if (count >= kWidth<T>) return store_elements(to, values);
#if defined(__AVX512F__)
  const unsigned mask = (1u << count) - 1;
  if constexpr (std::is_same_v<Element, float>) {
    __m512 lanes;
    std::memcpy(&lanes, &values, sizeof(lanes));
    return _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), lanes);
  } else if constexpr (sizeof(Element) == 2) {
    Element whole[kWidth<T>];
    store_elements(whole, values);
    __m256i lanes;
    std::memcpy(&lanes, whole, sizeof(lanes));
    return _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), lanes);
  }
#endif
  alignas(kVectorBytes) T lanes[kWidth<T>];
  store(lanes, values);
  write_row(lanes, count, T(1), to);
}

}  // namespace kernelpose::cpu::KP_ISA
