// What a warp does together: shuffles, votes, ldmatrix and mma.
#include <cstring>

#include "block.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace kernelpose::emulator {
namespace {

struct Shuffle {
  uint64_t bits, result;
  int source;
};

struct Vote {
  bool predicate;
  uint32_t result;
};

struct Rows {
  uint16_t element[8];  // of the row this lane names
  uint32_t* registers;
  bool transposed;
};

struct Mma {
  float* d;
  const uint32_t *a, *b;
  const float* c;
};

template <class T>
float value_of(uint16_t bits) {
  return float(kp_bits<T>(bits));
}

// Fragments as the PTX manual draws them: group g = lane / 4, t = lane % 4, and each register
// holds two neighbours along k.
template <class T>
void multiply(void* const (&slots)[kWarp]) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Mma& m = *static_cast<const Mma*>(slots[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int low = 0; low < 2; ++low) {
      for (int r = 0; r < 4; ++r) {
        a[g + r % 2 * 8][2 * t + r / 2 * 8 + low] = value_of<T>(uint16_t(m.a[r] >> 16 * low));
      }
      for (int r = 0; r < 2; ++r) {
        b[2 * t + r * 8 + low][g] = value_of<T>(uint16_t(m.b[r] >> 16 * low));
        c[g + r * 8][2 * t + low] = m.c[2 * r + low];
      }
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const Mma& m = *static_cast<const Mma*>(slots[lane]);
    for (int r = 0; r < 4; ++r) m.d[r] = c[lane / 4 + r / 2 * 8][2 * (lane % 4) + r % 2];
  }
}

void distribute(void* const (&slots)[kWarp]) {
  const auto rows = [&](int lane) -> const Rows& { return *static_cast<const Rows*>(slots[lane]); };
  for (int lane = 0; lane < kWarp; ++lane) {
    const Rows& mine = rows(lane);
    const int high = lane / 4, low = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const uint32_t first =
          mine.transposed ? rows(8 * i + low).element[high] : rows(8 * i + high).element[low];
      const uint32_t second = mine.transposed ? rows(8 * i + low + 1).element[high]
                                              : rows(8 * i + high).element[low + 1];
      mine.registers[i] = first | second << 16;
    }
  }
}

}  // namespace

uint64_t shuffle(uint32_t mask, uint64_t bits, int source_lane, Site site) {
  Shuffle mine{bits, 0, source_lane};
  meet(
      "a shuffle", mask, &mine,
      [](void* const(&slots)[kWarp]) {
        for (void* slot : slots) {
          if (slot == nullptr) continue;
          auto& s = *static_cast<Shuffle*>(slot);
          // The value of a lane that does not take part is undefined: poison.
          const auto* source = static_cast<const Shuffle*>(slots[s.source]);
          s.result = source == nullptr ? ~uint64_t{0} : source->bits;
        }
      },
      site);
  return mine.result;
}

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  Vote mine{predicate, 0};
  meet(
      "a vote", mask, &mine,
      [](void* const(&slots)[kWarp]) {
        uint32_t result = 0;
        for (int lane = 0; lane < kWarp; ++lane) {
          const auto* vote = static_cast<const Vote*>(slots[lane]);
          if (vote != nullptr && vote->predicate) result |= 1u << lane;
        }
        for (void* slot : slots) {
          if (slot != nullptr) static_cast<Vote*>(slot)->result = result;
        }
      },
      site);
  return mine.result;
}

void mma(bool bfloat16, float* d, const uint32_t* a, const uint32_t* b, const float* c, Site site) {
  Mma mine{d, a, b, c};
  meet(bfloat16 ? "mma bf16" : "mma f16", ~0u, &mine,
       bfloat16 ? multiply<__nv_bfloat16> : multiply<__half>, site);
}

void ldmatrix(uint32_t (&registers)[4], bool transposed, const void* row, Site site,
              const void* pc) {
  Rows mine{{}, registers, transposed};
  if (!block.in_shared(row, 16)) {
    fail("ldmatrix at %s:%d: the row is not in shared memory", site.file, site.line);
  }
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    fail("ldmatrix at %s:%d: the row is not aligned to 16 bytes", site.file, site.line);
  }
  // Read now, before the others come: the instruction orders no memory accesses, __syncwarp does.
  record_access(*current, row, 16, false, pc);
  std::memcpy(mine.element, row, 16);
  meet(transposed ? "ldmatrix x4 trans" : "ldmatrix x4", ~0u, &mine, distribute, site);
}

}  // namespace kernelpose::emulator
