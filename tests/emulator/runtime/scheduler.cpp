// Runs the blocks of a grid one after another, and the threads of a block as fibers that change
// over where they meet. The thread first in `order` runs as far as it can: the order comes from
// KERNELPOSE_EMULATOR_SEED and the block, and seeds 2n and 2n + 1 have opposite orders, so that of
// two threads with nothing between them each comes first once.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <string>

#include "block.h"
#include "cuda_runtime.h"

extern "C" {
[[gnu::weak]] void __asan_poison_memory_region(const void*, size_t);
[[gnu::weak]] void __asan_unpoison_memory_region(const void*, size_t);
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace kernelpose::emulator {

Block block;
Thread* current = nullptr;

namespace {

constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 64 << 10;
constexpr int kExitCode = 70;

Context host;
void (*thread_body)(void*);
void* thread_argument;

long environment(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtol(text, nullptr, 10);
}

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash == nullptr ? path : slash + 1;
}

std::string left_out;  // file and line of a meeting point that does nothing, "" for none
int left_out_line;

std::string name_of(Site site) {
  return std::string(base_name(site.file)) + ":" + std::to_string(site.line);
}

bool same_site(Site a, Site b) {
  if (a.line != b.line) return false;
  return a.file == b.file || (a.file && b.file && std::strcmp(a.file, b.file) == 0);
}

void set_ready(Thread& t) {
  t.wait = {};
  block.ready[t.rank / 64] |= uint64_t{1} << (t.rank % 64);
}

Thread* next_ready() {
  for (size_t word = 0; word < block.ready.size(); ++word) {
    if (block.ready[word] != 0) {
      return block.thread[block.order[word * 64 + __builtin_ctzll(block.ready[word])]].get();
    }
  }
  return nullptr;
}

// Who waits where, neighbours with the same fate on one line.
std::string describe_threads() {
  std::string text;
  for (int first = 0, end; first < block.threads; first = end) {
    const Thread& a = *block.thread[first];
    const auto same = [&](const Thread& b) {
      return a.exited == b.exited && a.wait.what == b.wait.what && a.wait.mask == b.wait.mask &&
             same_site(a.wait.site, b.wait.site) && a.wait.complete == b.wait.complete;
    };
    for (end = first + 1; end < block.threads && same(*block.thread[end]); ++end) {
    }
    char line[256], mask[32] = "";
    if (a.wait.mask != 0) std::snprintf(mask, sizeof mask, " mask %08x", a.wait.mask);
    std::snprintf(line, sizeof line, "  threads %d..%d: %s %s%s\n", first, end - 1,
                  a.exited                 ? "have exited"
                  : a.wait.what == nullptr ? "can run"
                                           : a.wait.what,
                  a.wait.what == nullptr ? "" : ("at " + name_of(a.wait.site)).c_str(), mask);
    text += line;
  }
  return text;
}

void resume(Thread& next) {
  current = &next;
  threadIdx = {next.index.x, next.index.y, next.index.z};
}

// Leaves the running thread, which waits or has exited, for the one that is due.
void yield(Thread& self) {
  block.ready[self.rank / 64] &=
      ~(uint64_t{self.wait.what != nullptr || self.exited} << (self.rank % 64));
  Thread* next = next_ready();
  if (next == &self) return;
  if (next != nullptr) {
    resume(*next);
    self.context.switch_to(next->context, self.exited);
  } else if (block.alive == 0) {
    current = nullptr;
    self.context.switch_to(host, true);
  } else {
    fail("deadlock, nobody can go on\n%s", describe_threads().c_str());
  }
}

// The block's barrier opens when every thread that has not exited stands at it.
void open_barrier_if_complete() {
  if (block.alive == 0 || block.arrived < block.alive) return;
  const Thread* first = nullptr;
  for (auto& t : block.thread) {
    if (t->exited) continue;
    if (first == nullptr) first = t.get();
    if (t->wait.what != first->wait.what || !same_site(t->wait.site, first->wait.site)) {
      fail("threads of a block meet at different barriers\n%s", describe_threads().c_str());
    }
  }
  block.arrived = 0;
  block.votes_counted = block.votes;
  block.votes = 0;
  ++block.epoch;
  for (auto& t : block.thread) {
    if (!t->exited) set_ready(*t);
  }
}

void run_thread() {
  Context::started();
  thread_body(thread_argument);
  Thread& self = *current;
  self.exited = true;
  --block.alive;
  open_barrier_if_complete();
  yield(self);
}

// Order of the block's threads: warps shuffled, lanes shuffled; every other pair of seeds moves one
// single thread to the end.
void choose_order(long seed, uint64_t block_number) {
  std::mt19937_64 random(uint64_t(seed / 2) * 0x9e3779b97f4a7c15u + block_number);
  const auto shuffle = [&](std::vector<int>& v) {  // std::shuffle differs between libraries
    for (size_t i = v.size(); i > 1; --i) std::swap(v[i - 1], v[random() % i]);
  };
  std::vector<int> warps((block.threads + kWarp - 1) / kWarp), lanes(kWarp);
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  shuffle(warps);
  block.order.clear();
  for (int warp : warps) {
    shuffle(lanes);
    for (int lane : lanes) {
      if (warp * kWarp + lane < block.threads) block.order.push_back(warp * kWarp + lane);
    }
  }
  if (seed / 2 % 2 == 1) {
    const auto victim = block.order.begin() + random() % block.order.size();
    std::rotate(victim, victim + 1, block.order.end());
  }
  if (seed % 2 == 1) std::reverse(block.order.begin(), block.order.end());
}

// Blocks share their stacks and their shared memory: only one of them is there at a time.
void* stack_of(int id) {
  static std::vector<void*> stacks;
  const size_t guard = sysconf(_SC_PAGESIZE);
  while (int(stacks.size()) <= id) {
    char* memory = static_cast<char*>(mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED) fail("no memory for the stack of thread %d", id);
    mprotect(memory, guard, PROT_NONE);
    stacks.push_back(memory + guard);
  }
  return stacks[id];
}

void prepare_shared(size_t bytes) {
  static const size_t room = (size_t{228} << 10) + 2 * kGuardBytes;
  static char* const memory = static_cast<char*>(
      mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  // 0xff.. is NaN as a float, a half and a bfloat16, and an index that points nowhere.
  block.shared = memory + kGuardBytes + 128;  // aligned to 128 bytes and no more
  block.shared_bytes = bytes;
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(memory, room);
  std::memset(memory, 0xff, room);
  if (__asan_poison_memory_region) {
    __asan_poison_memory_region(memory, block.shared - memory);
    __asan_poison_memory_region(block.shared + bytes, memory + room - block.shared - bytes);
  }
}

void run_block(Dim index, uint64_t number, long seed) {
  block.index = index;
  blockIdx = {index.x, index.y, index.z};
  prepare_shared(block.shared_bytes);
  ++block.epoch;
  block.alive = block.threads;
  block.arrived = block.votes = 0;
  block.waiting.assign((block.threads + kWarp - 1) / kWarp, 0);
  block.ready.assign((block.threads + 63) / 64, 0);
  while (int(block.thread.size()) > block.threads) block.thread.pop_back();
  while (int(block.thread.size()) < block.threads) {
    block.thread.push_back(std::make_unique<Thread>());
  }
  choose_order(seed, number);
  for (int id = 0; id < block.threads; ++id) {
    Thread& t = *block.thread[id];
    t.id = id;
    t.index = {id % block.size.x, id / block.size.x % block.size.y,
               id / (block.size.x * block.size.y)};
    t.exited = false;
    t.open_group.clear();
    t.groups.clear();
    std::fill(std::begin(t.clock), std::end(t.clock), 0);
    t.clock[t.lane()] = 1;
    t.context.prepare(stack_of(id), kStackBytes, run_thread);
  }
  for (int rank = 0; rank < block.threads; ++rank) {
    Thread& t = *block.thread[block.order[rank]];
    t.rank = rank;
    set_ready(t);
  }
  Thread& first = *next_ready();
  resume(first);
  host.switch_to(first.context);
}

bool is_left_out(Site site) {
  return site.line == left_out_line && left_out == base_name(site.file);
}

void wait_for_block(const char* what, Site site) {
  Thread& self = *current;
  self.wait = {what, 0, site, nullptr, nullptr};
  ++block.arrived;
  open_barrier_if_complete();
  yield(self);
}

}  // namespace

void fail(const char* format, ...) {
  std::fflush(nullptr);
  std::fputs("kernelpose emulator: ", stderr);
  if (current != nullptr) {
    std::fprintf(stderr, "block (%u, %u, %u) thread (%u, %u, %u): ", block.index.x, block.index.y,
                 block.index.z, current->index.x, current->index.y, current->index.z);
  }
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  _exit(kExitCode);  // threads stand in the middle of kernels: there is nothing to return to
}

int lane() { return current->lane(); }
void* dynamic_shared() { return block.shared; }

int shared_limit() { return int(environment("KERNELPOSE_EMULATOR_SHARED_LIMIT", 227 << 10)); }

void sync_threads(Site site) {
  if (is_left_out(site)) return;
  wait_for_block("__syncthreads", site);
}

int sync_threads_count(bool predicate, Site site) {
  block.votes += predicate;
  wait_for_block("__syncthreads_count", site);
  return block.votes_counted;
}

void meet(const char* what, uint32_t mask, void* slot, Complete complete, Site site) {
  Thread& self = *current;
  const int warp = self.warp();
  if ((mask >> self.lane() & 1) == 0) {
    fail("%s at %s: the mask %08x leaves out the lane %d that runs it", what, name_of(site).c_str(),
         mask, self.lane());
  }
  self.wait = {what, mask, site, complete, slot};
  uint32_t& waiting = block.waiting[warp];
  waiting |= 1u << self.lane();
  if ((waiting & mask) == mask) {
    void* slots[kWarp] = {};
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      const Thread& t = *block.thread[warp * kWarp + __builtin_ctz(rest)];
      const Wait &a = self.wait, &b = t.wait;
      if (a.what != b.what || a.mask != b.mask || a.complete != b.complete ||
          !same_site(a.site, b.site)) {
        fail("lanes of a warp meet at different instructions\n%s", describe_threads().c_str());
      }
      slots[t.lane()] = t.wait.slot;
    }
    complete(slots);
    waiting &= ~mask;
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      set_ready(*block.thread[warp * kWarp + __builtin_ctz(rest)]);
    }
  }
  yield(self);
}

void sync_warp(uint32_t mask, Site site) {
  if (is_left_out(site)) return;
  meet(
      "__syncwarp", mask, current,
      [](void* const(&slots)[kWarp]) {
        uint32_t lanes = 0;
        for (int lane = 0; lane < kWarp; ++lane) lanes |= uint32_t{slots[lane] != nullptr} << lane;
        order_lanes(lanes);
      },
      site);
}

void cp_async_16(void* shared, const void* global, bool valid, Site site, const void* pc) {
  if (!block.in_shared(shared, 16)) {
    fail("cp_async_16 at %s: the destination is not in shared memory", name_of(site).c_str());
  }
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0)) {
    fail("cp_async_16 at %s: addresses must be multiples of 16", name_of(site).c_str());
  }
  // From here until the wait it may land at any time: what was there is gone, what comes is not
  // there yet.
  record_access(*current, shared, 16, true, pc);
  std::memset(shared, 0xff, 16);
  current->open_group.push_back({shared, global, valid});
}

void cp_async_commit(Site site) {
  if (is_left_out(site)) return;
  current->groups.push_back(std::move(current->open_group));
  current->open_group.clear();
}

void cp_async_wait(int groups_left, Site site, const void* pc) {
  if (is_left_out(site)) return;
  auto& groups = current->groups;
  while (int(groups.size()) > groups_left) {
    for (const Copy& copy : groups.front()) {
      record_access(*current, copy.shared, 16, true, pc);
      if (copy.valid) {
        std::memcpy(copy.shared, copy.global, 16);
      } else {
        std::memset(copy.shared, 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
}

int run_grid(Dim grid, Dim size, size_t shared_bytes, void (*body)(void*), void* argument) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  if (threads == 0 || threads > 1024 || size.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > size_t(shared_limit())) return cudaErrorInvalidValue;
  const long seed = environment("KERNELPOSE_EMULATOR_SEED", 0);
  const char* skip = std::getenv("KERNELPOSE_EMULATOR_SKIP");  // "file.cu:12"
  left_out = skip == nullptr ? "" : skip;
  const size_t colon = std::min(left_out.find(':'), left_out.size());
  left_out_line = std::atoi(left_out.c_str() + std::min(colon + 1, left_out.size()));
  left_out.resize(colon);

  block.grid = grid;
  block.size = size;
  block.threads = int(threads);
  block.shared_bytes = shared_bytes;
  gridDim = {grid.x, grid.y, grid.z};
  blockDim = {size.x, size.y, size.z};
  thread_body = body;
  thread_argument = argument;
  watch_races(environment("KERNELPOSE_EMULATOR_RACES", 1) != 0, shared_bytes);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t number = seed % 2 == 1 ? blocks - 1 - i : i;
    run_block({unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
               unsigned(number / grid.x / grid.y)},
              number, seed);
  }
  return cudaSuccess;
}

}  // namespace kernelpose::emulator
