#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace kernelpose::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Isa detect() {
  Isa best = Isa::kBaseline;
#ifdef KP_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    best = Isa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Isa::kAvx512;
    }
  }
#endif
  const char* wanted = std::getenv("KERNELPOSE_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int level = 0; level <= static_cast<int>(Isa::kAvx512); ++level) {
    if (std::strcmp(wanted, kNames[level]) == 0) {
      return level < static_cast<int>(best) ? static_cast<Isa>(level) : best;
    }
  }
  throw std::invalid_argument("KERNELPOSE_CPU_ISA is '" + std::string(wanted) +
                              "'; expected baseline, avx2 or avx512.");
}

}  // namespace

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

const char* isa_name() { return kNames[static_cast<int>(isa())]; }

}  // namespace kernelpose::cpu
