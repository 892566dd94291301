// Vectors at the end of a row, of which only the first lanes exist.
#pragma once

#include "simd.h"

namespace kernelpose::cpu::KP_ISA {

// The first `count` lanes of a vector; the others are 0.
template <class Element>
inline Vector<Compute<Element>> load_part(const Element* from, int count) {
  using T = Compute<Element>;
  if (count >= kWidth<T>) return load_elements(from);
  alignas(kVectorBytes) T lanes[kWidth<T>] = {};
  read_row(from, count, T(1), lanes);
  return load(lanes);
}

template <class Element>
inline void store_part(Element* to, Vector<Compute<Element>> values, int count) {
  using T = Compute<Element>;
  if (count >= kWidth<T>) return store_elements(to, values);
  alignas(kVectorBytes) T lanes[kWidth<T>];
  store(lanes, values);
  write_row(lanes, count, T(1), to);
}

}  // namespace kernelpose::cpu::KP_ISA
