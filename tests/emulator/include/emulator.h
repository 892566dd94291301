// What the stand-in CUDA headers call: the block being run, and the meeting points of its threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kernelpose::emulator {

struct Dim {
  unsigned x, y, z;
};

// Where in the kernel's source a meeting point stands, for reports and for leaving one out.
struct Site {
  const char* file;
  int line;
};

#define KP_SITE_PARAMETERS const char *file = __builtin_FILE(), int line = __builtin_LINE()

void sync_threads(Site site);
// __syncthreads_or and its kin: the number of threads whose predicate holds.
int sync_threads_count(bool predicate, Site site);
void sync_warp(uint32_t mask, Site site);

// The lanes of `mask` meet; the last one to come runs `complete` on what each of them brought.
// Lanes outside the mask have a null slot. Orders no memory accesses.
using Complete = void (*)(void* const (&slots)[32]);
void meet(const char* what, uint32_t mask, void* slot, Complete complete, Site site);

// Same, for .sync.aligned instructions: all 32 lanes.
void mma(bool bfloat16, float* d, const uint32_t* a, const uint32_t* b, const float* c, Site site);
// `pc` is the code address to name when the access turns out to be a race.
void ldmatrix(uint32_t (&registers)[4], bool transposed, const void* row, Site site,
              const void* pc);
uint64_t shuffle(uint32_t mask, uint64_t bits, int source_lane, Site site);
uint32_t ballot(uint32_t mask, bool predicate, Site site);

void cp_async_16(void* shared, const void* global, bool valid, Site site, const void* pc);
void cp_async_commit(Site site);
void cp_async_wait(int groups_left, Site site, const void* pc);

int lane();  // of the thread that runs
void* dynamic_shared();
int shared_limit();  // bytes a block may ask for

// Runs a grid to its end; 0, or the cudaError_t with which the driver refuses such a launch.
int run_grid(Dim grid, Dim block, size_t shared_bytes, void (*thread)(void*), void* argument);

[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

}  // namespace kernelpose::emulator
