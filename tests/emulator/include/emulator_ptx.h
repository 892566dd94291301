// The PTX primitives of kernelpose/ptx.cuh, emulated; the PTX ISA manual defines each of them.
#pragma once

#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

// So that the return address is the line of the kernel.
#define KP_NOT_INLINE __attribute__((noinline)) inline

namespace kernelpose {

// mma.sync.aligned.m16n8k16.row.col.f32.T.T.f32; d may be c.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const float (&c)[4], KP_SITE_PARAMETERS) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  emulator::mma(std::is_same_v<T, __nv_bfloat16>, d, a, b, c, {file, line});
}

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16; lane 8i + j names row j of matrix i.
KP_NOT_INLINE void ldmatrix_x4(uint32_t (&r)[4], const void* row, KP_SITE_PARAMETERS) {
  emulator::ldmatrix(r, false, row, {file, line}, __builtin_return_address(0));
}
KP_NOT_INLINE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, KP_SITE_PARAMETERS) {
  emulator::ldmatrix(r, true, row, {file, line}, __builtin_return_address(0));
}

// cp.async.cg.shared.global of 16 bytes; zeros where !valid, and `global` is then not read.
KP_NOT_INLINE void cp_async_16(void* shared, const void* global, bool valid, KP_SITE_PARAMETERS) {
  if (valid) {  // a plain read, so that the address sanitizer judges the address
    volatile uint64_t probe = static_cast<const volatile uint64_t*>(global)[0];
    probe = static_cast<const volatile uint64_t*>(global)[1];
    (void)probe;
  }
  emulator::cp_async_16(shared, global, valid, {file, line}, __builtin_return_address(0));
}
inline void cp_async_commit(KP_SITE_PARAMETERS) { emulator::cp_async_commit({file, line}); }
template <int N>
KP_NOT_INLINE void cp_async_wait(KP_SITE_PARAMETERS) {
  emulator::cp_async_wait(N, {file, line}, __builtin_return_address(0));
}

}  // namespace kernelpose
