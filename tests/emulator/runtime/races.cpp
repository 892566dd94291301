// Races on shared memory: two accesses to a byte by two threads, one of them a write, with neither
// __syncthreads nor __syncwarp between them. Found in whatever order the threads happen to run.
//
// The kernels are compiled so that the address sanitizer's checks are calls (see build.py). The
// calls end up here first and then go on to the sanitizer. A byte remembers its last write and two
// unordered reads; a thread has a clock per lane of its warp, which __syncwarp joins; the block's
// barrier starts a new epoch, in which nothing before it matters any more.
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "block.h"

extern "C" {
[[gnu::weak]] void __sanitizer_print_stack_trace();
[[gnu::weak]] void __sanitizer_symbolize_pc(void* pc, const char* format, char* out, size_t bytes);
}

namespace kernelpose::emulator {
namespace {

struct Access {
  uint32_t epoch;  // block barriers before it; 0: none
  uint32_t thread : 10, clock : 22;
  const void* pc;  // where the check was called, to be found in the sources
};

struct Byte {
  Access write, read[2];
};

std::vector<Byte> bytes_of_block;  // empty: not watched

bool ordered(const Access& before, const Thread& now) {
  if (before.epoch != block.epoch || int(before.thread) == now.id) return true;
  return int(before.thread) / kWarp == now.warp() &&
         now.clock[before.thread % kWarp] >= before.clock;
}

std::string source_line(const void* pc) {
  char text[512] = "?";
  if (__sanitizer_symbolize_pc) {
    // The address is where the call returns to, so step back into it.
    __sanitizer_symbolize_pc(const_cast<char*>(static_cast<const char*>(pc) - 1), "%s:%l in %f",
                             text, sizeof text);
  }
  return text;
}

[[noreturn]] void report(const Access& before, bool before_writes, const Thread& now, bool write,
                         size_t offset) {
  if (__sanitizer_print_stack_trace) __sanitizer_print_stack_trace();
  fail(
      "race on byte %zu of shared memory: thread %d %s it, and thread %u %s it at %s, with no "
      "barrier between them",
      offset, now.id, write ? "writes" : "reads", before.thread, before_writes ? "wrote" : "read",
      source_line(before.pc).c_str());
}

}  // namespace

void record_access(Thread& thread, const void* address, size_t count, bool write, const void* pc) {
  if (bytes_of_block.empty()) return;
  const size_t offset = static_cast<const char*>(address) - block.shared;
  const Access access{block.epoch, uint32_t(thread.id), thread.clock[thread.lane()], pc};
  for (size_t i = offset; i < std::min(offset + count, block.shared_bytes); ++i) {
    Byte& byte = bytes_of_block[i];
    if (!ordered(byte.write, thread)) report(byte.write, true, thread, write, i);
    if (write) {
      for (const Access& read : byte.read) {
        if (!ordered(read, thread)) report(read, false, thread, write, i);
      }
      byte.write = access;
    } else if (ordered(byte.read[0], thread)) {
      byte.read[0] = access;
    } else {
      byte.read[1] = access;  // two unordered readers already conflict with any writer
    }
  }
}

void order_lanes(uint32_t mask) {
  uint32_t joined[kWarp] = {};
  const int first = current->warp() * kWarp;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const Thread& t = *block.thread[first + __builtin_ctz(rest)];
    for (int i = 0; i < kWarp; ++i) joined[i] = std::max(joined[i], t.clock[i]);
  }
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    Thread& t = *block.thread[first + __builtin_ctz(rest)];
    std::copy(std::begin(joined), std::end(joined), t.clock);
    ++t.clock[t.lane()];
  }
}

void watch_races(bool watched, size_t shared_bytes) {
  bytes_of_block.assign(watched ? shared_bytes : 0, {});
}

}  // namespace kernelpose::emulator

namespace {

using namespace kernelpose::emulator;

// True if the access is to shared memory and hence in order as far as the sanitizer goes.
bool watched(const void* address, size_t bytes, bool write, const void* pc) {
  if (current == nullptr || !block.in_shared(address, bytes)) return false;
  record_access(*current, address, bytes, write, pc);
  return true;
}

}  // namespace

// Each check of a known size, and the one that takes the size as an argument. Hidden, so that the
// kernels of this library find these and not the sanitizer's own.
#define KP_CHECK(name, bytes, write)                                                 \
  static auto* const real_##name =                                                   \
      reinterpret_cast<void (*)(const void*)>(dlsym(RTLD_DEFAULT, "__asan_" #name)); \
  extern "C" [[gnu::visibility("hidden")]] void __asan_##name(const void* address) { \
    if (watched(address, bytes, write, __builtin_return_address(0))) return;         \
    if (real_##name != nullptr) real_##name(address);                                \
  }
#define KP_CHECK_N(name, write)                                                                \
  static auto* const real_##name =                                                             \
      reinterpret_cast<void (*)(const void*, size_t)>(dlsym(RTLD_DEFAULT, "__asan_" #name));   \
  extern "C" [[gnu::visibility("hidden")]] void __asan_##name(const void* address, size_t n) { \
    if (watched(address, n, write, __builtin_return_address(0))) return;                       \
    if (real_##name != nullptr) real_##name(address, n);                                       \
  }
KP_CHECK(load1, 1, false)
KP_CHECK(load2, 2, false)
KP_CHECK(load4, 4, false)
KP_CHECK(load8, 8, false)
KP_CHECK(load16, 16, false)
KP_CHECK(store1, 1, true)
KP_CHECK(store2, 2, true)
KP_CHECK(store4, 4, true)
KP_CHECK(store8, 8, true)
KP_CHECK(store16, 16, true)
KP_CHECK_N(loadN, false)
KP_CHECK_N(storeN, true)
