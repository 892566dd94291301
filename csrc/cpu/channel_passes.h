// What ops share that sum over the pixels of each channel and then scale each channel by numbers
// made of those sums: the two passes over an image, in either memory format, and their threads.
//
// An image is summed and then written while it is still in the cache; where there are fewer images
// than threads, each is split by channels. A sum is taken in one order, however that falls out.
#pragma once

#include <algorithm>
#include <array>

#include "kernelpose/maps.h"
#include "parallel.h"
#include "simd.h"

namespace kernelpose::cpu::KP_ISA {

constexpr int64_t kChannelBlock = 1024;     // channels that are written together
constexpr int64_t kTaskElements = 1 << 15;  // fewer are not worth waking a thread for
constexpr int64_t kAheadBytes = 2048;       // by which memory is asked for before its turn

// run(element) with an element of the type that dtype names.
template <class Run>
inline void with_element(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(float{});
    case DType::kFloat16:
      return run(Half{});
    case DType::kBFloat16:
      return run(BFloat16{});
    case DType::kFloat64:
      return run(double{});
  }
}

// What kInputs tensors hold at one place: vectors (V) or single numbers, in the compute type.
template <class V, int kInputs, class Element>
struct Values {
  V of[kInputs];

  Values(const Element* const (&inputs)[kInputs], int64_t offset) {
    for (int i = 0; i < kInputs; ++i) {
      if constexpr (std::is_same_v<V, Compute<Element>>) {
        of[i] = to_compute(inputs[i][offset]);
      } else {
        of[i] = load_elements(inputs[i] + offset);
      }
    }
  }
};

// sums[k][c] for `count` channels from `first` on. accumulate(values, factors, sums) adds what one
// place's values of all inputs and its channel's factors give; inputs point at an image, factors
// and sums at the first of the channels.
template <int kInputs, int kSums, class Element, size_t kFactors, class Accumulate>
inline void sum_over_pixels(const Maps& maps, const Element* const (&inputs)[kInputs],
                            int64_t first, int64_t count,
                            const std::array<const Compute<Element>*, kFactors>& factors,
                            Compute<Element>* const (&sums)[kSums], const Accumulate& accumulate) {
  using T = Compute<Element>;
  using V = Vector<T>;
  using Vectors = Values<V, kInputs, Element>;
  using Numbers = Values<T, kInputs, Element>;
  constexpr int n = kWidth<T>;
  if (!maps.channels_last) {
    constexpr int kUnroll = 4;
    for (int64_t c = 0; c < count; ++c) {
      const int64_t row = (first + c) * maps.pixels;
      std::array<V, kFactors> own;
      std::array<T, kFactors> own_numbers;
      for (int k = 0; k < static_cast<int>(kFactors); ++k) {
        own[k] = broadcast(own_numbers[k] = factors[k][c]);
      }
      V parts[kUnroll][kSums] = {};
      int64_t p = 0;
      for (; p + kUnroll * n <= maps.pixels; p += kUnroll * n) {
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t place = row + p + u * n;
          for (int i = 0; i < kInputs; ++i) {
            __builtin_prefetch(inputs[i] + place + kAheadBytes / sizeof(Element));
          }
          accumulate(Vectors(inputs, place).of, own, parts[u]);
        }
      }
      for (; p + n <= maps.pixels; p += n) accumulate(Vectors(inputs, row + p).of, own, parts[0]);
      T rest[kSums] = {};
      for (; p < maps.pixels; ++p) accumulate(Numbers(inputs, row + p).of, own_numbers, rest);
      for (int k = 0; k < kSums; ++k) {
        const V part = (parts[0][k] + parts[1][k]) + (parts[2][k] + parts[3][k]);
        sums[k][c] = reduce_sum<T>(part) + rest[k];
      }
    }
    return;
  }
  // Rows are summed before they join the rest, and kPart rows before they join the image's sums:
  // fewer turns at the sums, and smaller errors.
  constexpr int64_t kPart = 64;
  T parts[kSums][kChannelBlock];
  const auto add_rows = [&](int64_t p, auto rows, int64_t from, int64_t some) {
    const int64_t row = p * maps.channels + first + from;
    int64_t c = 0;
    for (; c + n <= some; c += n) {
      std::array<V, kFactors> own;
      for (int k = 0; k < static_cast<int>(kFactors); ++k) own[k] = load(factors[k] + from + c);
      V part[kSums] = {};
      for (int r = 0; r < rows; ++r) {
        accumulate(Vectors(inputs, row + r * maps.channels + c).of, own, part);
      }
      for (int k = 0; k < kSums; ++k) store(parts[k] + c, load(parts[k] + c) + part[k]);
    }
    for (; c < some; ++c) {
      std::array<T, kFactors> own;
      for (int k = 0; k < static_cast<int>(kFactors); ++k) own[k] = factors[k][from + c];
      T part[kSums] = {};
      for (int r = 0; r < rows; ++r) {
        accumulate(Numbers(inputs, row + r * maps.channels + c).of, own, part);
      }
      for (int k = 0; k < kSums; ++k) parts[k][c] += part[k];
    }
  };
  for (int k = 0; k < kSums; ++k) std::fill(sums[k], sums[k] + count, T(0));
  for (int64_t from = 0; from < count; from += kChannelBlock) {
    const int64_t some = std::min(kChannelBlock, count - from);
    for (int64_t p = 0; p < maps.pixels;) {
      const int64_t end = std::min(maps.pixels, p + kPart);
      for (int k = 0; k < kSums; ++k) std::fill(parts[k], parts[k] + some, T(0));
      for (; p + 8 <= end; p += 8) add_rows(p, std::integral_constant<int, 8>{}, from, some);
      for (; p < end; ++p) add_rows(p, std::integral_constant<int, 1>{}, from, some);
      for (int k = 0; k < kSums; ++k) {
        for (int64_t c = 0; c < some; ++c) sums[k][from + c] += parts[k][c];
      }
    }
  }
}

// The same of the values alone: accumulate(values, sums).
template <int kInputs, int kSums, class Element, class Accumulate>
inline void sum_over_pixels(const Maps& maps, const Element* const (&inputs)[kInputs],
                            int64_t first, int64_t count, Compute<Element>* const (&sums)[kSums],
                            const Accumulate& accumulate) {
  sum_over_pixels<kInputs, kSums, Element>(
      maps, inputs, first, count, std::array<const Compute<Element>*, 0>{}, sums,
      [&](const auto& values, const auto&, auto& own) { accumulate(values, own); });
}

// Writes the outputs of `count` channels from `first` on. combine(values, factors, results) makes
// one place's results of its values and its channel's factors; inputs and outputs point at an
// image, factors at the first of the channels.
template <int kInputs, int kOutputs, int kFactors, class Element, class Combine>
inline void scale_channels(const Maps& maps, const Element* const (&inputs)[kInputs],
                           Element* const (&outputs)[kOutputs], int64_t first, int64_t count,
                           const Compute<Element>* const (&factors)[kFactors],
                           const Combine& combine) {
  using T = Compute<Element>;
  using V = Vector<T>;
  constexpr int n = kWidth<T>;
  const auto write = [&](int64_t offset, const V(&own)[kFactors]) {
    V results[kOutputs];
    combine(Values<V, kInputs, Element>(inputs, offset).of, own, results);
    for (int i = 0; i < kOutputs; ++i) {
      __builtin_prefetch(outputs[i] + offset + kAheadBytes / sizeof(Element), 1);
      store_elements(outputs[i] + offset, results[i]);
    }
  };
  const auto write_one = [&](int64_t offset, int64_t c) {
    T own[kFactors], results[kOutputs];
    for (int k = 0; k < kFactors; ++k) own[k] = factors[k][c];
    combine(Values<T, kInputs, Element>(inputs, offset).of, own, results);
    for (int i = 0; i < kOutputs; ++i) from_compute(results[i], outputs[i][offset]);
  };
  if (!maps.channels_last) {
    for (int64_t c = 0; c < count; ++c) {
      const int64_t row = (first + c) * maps.pixels;
      V own[kFactors];
      for (int k = 0; k < kFactors; ++k) own[k] = broadcast(factors[k][c]);
      int64_t p = 0;
      for (; p + n <= maps.pixels; p += n) write(row + p, own);
      for (; p < maps.pixels; ++p) write_one(row + p, c);
    }
    return;
  }
  for (int64_t p = 0; p < maps.pixels; ++p) {
    const int64_t row = p * maps.channels + first;
    int64_t c = 0;
    for (; c + n <= count; c += n) {
      V own[kFactors];
      for (int k = 0; k < kFactors; ++k) own[k] = load(factors[k] + c);
      write(row + c, own);
    }
    for (; c < count; ++c) write_one(row + c, c);
  }
}

// Both passes of an op over all images. op.reduce(image, first, count) sums some channels;
// op.prepare(image) makes of all their sums what op.apply(image, prepared, first, count) needs to
// write some, at most kChannelBlock.
template <class Op>
inline void run_channel_passes(const Maps& maps, int threads, const Op& op) {
  const auto apply = [&](int64_t image, int64_t first, int64_t end) {
    const auto prepared = op.prepare(image);
    for (int64_t c = first; c < end; c += kChannelBlock) {
      op.apply(image, prepared, c, std::min(kChannelBlock, end - c));
    }
  };
  const int64_t worth = maps.batch * maps.image() / kTaskElements;
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(worth, threads)));
  if (maps.batch >= threads) {
    parallel_for(maps.batch, threads, [&](int64_t image) {
      op.reduce(image, 0, maps.channels);
      apply(image, 0, maps.channels);
    });
    return;
  }
  const int64_t part = round_up((maps.channels + threads - 1) / threads, 64);
  const int64_t parts = (maps.channels + part - 1) / part;
  parallel_for(maps.batch * parts, threads, [&](int64_t task) {
    const int64_t first = task % parts * part;
    op.reduce(task / parts, first, std::min(part, maps.channels - first));
  });
  parallel_for(maps.batch * parts, threads, [&](int64_t task) {
    const int64_t first = task % parts * part;
    apply(task / parts, first, std::min(first + part, maps.channels));
  });
}

template <class T>
inline T sum_numbers(const T* p, int64_t count) {
  Vector<T> part = {};
  int64_t i = 0;
  for (; i + kWidth<T> <= count; i += kWidth<T>) part += load(p + i);
  T sum = reduce_sum<T>(part);
  for (; i < count; ++i) sum += p[i];
  return sum;
}

}  // namespace kernelpose::cpu::KP_ISA
