#include "parallel.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#endif

namespace kernelpose::cpu {
namespace {

// PyTorch brings an OpenMP runtime of its own. A second one in the process would keep a second team
// of threads, and each team spins while the other computes: 1.5 ms ops were seen to take 40. So the
// core links no OpenMP at all: it looks for the runtime that torch has loaded and enters that one's
// teams, through the one symbol that GNU, LLVM and Intel runtimes share.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Runtime {
  GompParallel parallel = nullptr;
  std::string name = "std::thread";
};

#if defined(__linux__)
int consider_library(dl_phdr_info* info, size_t, void* found_pointer) {
  auto& found = *static_cast<std::string*>(found_pointer);
  const char* slash = std::strrchr(info->dlpi_name, '/');
  const char* file = slash ? slash + 1 : info->dlpi_name;
  const bool openmp = std::strncmp(file, "libgomp", 7) == 0 ||
                      std::strncmp(file, "libiomp", 7) == 0 || std::strncmp(file, "libomp", 6) == 0;
  if (!openmp) return 0;
  const bool from_torch = std::strstr(info->dlpi_name, "/torch") != nullptr;
  if (found.empty() || from_torch) found = info->dlpi_name;
  return from_torch;
}
#endif

Runtime find_runtime() {
  Runtime runtime;
#if defined(__linux__)
  std::string library;
  dl_iterate_phdr(consider_library, &library);
  if (library.empty()) return runtime;
  // The handle is kept for good: the function must outlive every call.
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (!handle) return runtime;
  runtime.parallel = reinterpret_cast<GompParallel>(dlsym(handle, "GOMP_parallel"));
  if (runtime.parallel) runtime.name = "GOMP_parallel of " + library;
#endif
  return runtime;
}

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

struct Work {
  std::atomic<int64_t> next{0};
  int64_t tasks;
  void (*task)(void*, int64_t);
  void* context;

  static void run(void* work_pointer) {
    auto& work = *static_cast<Work*>(work_pointer);
    for (int64_t i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.tasks;) {
      work.task(work.context, i);
    }
  }
};

struct Scratch {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Scratch() { std::free(memory); }
};

}  // namespace

const char* parallel_runtime() { return runtime().name.c_str(); }

void run_parallel(int64_t tasks, int threads, void (*task)(void*, int64_t), void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  Work work;
  work.tasks = tasks;
  work.task = task;
  work.context = context;
  if (threads <= 1) {
    Work::run(&work);
  } else if (runtime().parallel) {
    runtime().parallel(Work::run, &work, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> helpers;
    helpers.reserve(threads - 1);
    try {
      for (int i = 1; i < threads; ++i) helpers.emplace_back(Work::run, &work);
    } catch (const std::system_error&) {
      // The system gives no more threads: those there are do all the work.
    }
    Work::run(&work);
    for (auto& helper : helpers) helper.join();
  }
}

void* thread_scratch(size_t bytes) {
  thread_local Scratch scratch;
  if (bytes > scratch.bytes) {
    std::free(scratch.memory);
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    scratch.memory = std::aligned_alloc(64, rounded);
    scratch.bytes = scratch.memory ? rounded : 0;
  }
  return scratch.memory;
}

void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + kHuge - 1) / kHuge * kHuge,
                  end = (start + bytes) / kHuge * kHuge;
  // Advice: where the system does not take it, nothing is lost.
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace kernelpose::cpu
