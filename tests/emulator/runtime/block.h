// The block that is being run: its threads, its shared memory, and who runs next.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "context.h"
#include "emulator.h"

namespace kernelpose::emulator {

constexpr int kWarp = 32;

struct Copy {  // a cp.async on its way
  void* shared;
  const void* global;
  bool valid;
};

// What a thread waits for. Two lanes meet if all but the slot is the same.
struct Wait {
  const char* what = nullptr;  // null: it runs or may run
  uint32_t mask = 0;           // 0: the whole block
  Site site = {};
  Complete complete = nullptr;
  void* slot = nullptr;
};

struct Thread {
  Context context;
  Dim index = {};
  int id = 0, rank = 0;
  bool exited = false;
  Wait wait;
  std::vector<Copy> open_group;
  std::vector<std::vector<Copy>> groups;
  uint32_t clock[kWarp] = {};  // see races.cpp

  int lane() const { return id % kWarp; }
  int warp() const { return id / kWarp; }
};

struct Block {
  Dim grid = {}, size = {}, index = {};
  int threads = 0, alive = 0, arrived = 0, votes = 0, votes_counted = 0;
  std::vector<std::unique_ptr<Thread>> thread;
  std::vector<int> order;         // thread ids, the first that may run runs
  std::vector<uint64_t> ready;    // bit per rank
  std::vector<uint32_t> waiting;  // per warp: lanes that wait for lanes
  uint32_t epoch = 0;             // counts block barriers, never starts over
  char* shared = nullptr;
  size_t shared_bytes = 0;

  bool in_shared(const void* p, size_t bytes) const {
    const char* c = static_cast<const char*>(p);
    return c >= shared && c + bytes <= shared + shared_bytes;
  }
};

extern Block block;
extern Thread* current;  // null outside a kernel

// races.cpp: every access to shared memory, and what puts accesses in order.
void record_access(Thread& thread, const void* address, size_t bytes, bool write, const void* pc);
void order_lanes(uint32_t mask);
void watch_races(bool watched, size_t shared_bytes);

}  // namespace kernelpose::emulator
