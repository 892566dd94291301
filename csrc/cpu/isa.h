// One kernel source, compiled once for each instruction set; the best one that this machine has
// runs.
//
// CMake compiles every csrc/cpu/<op>.cpp with KP_ISA = baseline, avx2 and avx512 (baseline alone on
// other processors), and the file puts all it defines in namespace kernelpose::cpu::KP_ISA.
#pragma once

namespace kernelpose::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// What runs: the best of this machine, or KERNELPOSE_CPU_ISA (baseline, avx2, avx512) if lower.
// Throws std::invalid_argument, on every call, where that variable is something else.
Isa isa();
const char* isa_name();

#ifdef KP_X86_LEVELS
#define KP_FOR_EACH_ISA(DECLARE) DECLARE(baseline) DECLARE(avx2) DECLARE(avx512)
#define KP_SELECT_ISA(function)                                                   \
  (::kernelpose::cpu::isa() == ::kernelpose::cpu::Isa::kAvx512 ? avx512::function \
   : ::kernelpose::cpu::isa() == ::kernelpose::cpu::Isa::kAvx2 ? avx2::function   \
                                                               : baseline::function)
#else
#define KP_FOR_EACH_ISA(DECLARE) DECLARE(baseline)
#define KP_SELECT_ISA(function) (::kernelpose::cpu::isa(), baseline::function)
#endif

}  // namespace kernelpose::cpu
