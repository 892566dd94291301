// Threads and memory for the CPU kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kernelpose::cpu {

// Runs task(context, i) for every i in [0, tasks) on up to `threads` threads, the caller included.
// A task must not throw and must not call run_parallel.
void run_parallel(int64_t tasks, int threads, void (*task)(void*, int64_t), void* context);

// What carries the threads: "GOMP_parallel of <library>" or "std::thread".
const char* parallel_runtime();

// At least `bytes` of 64-byte aligned memory that belongs to the calling thread and stays valid
// until its next call. nullptr where there is no memory left.
void* thread_scratch(size_t bytes);

// Asks for huge pages under memory of several MiB that is about to be written for the first time,
// as numpy does for its arrays: the system then clears 2 MiB at a fault instead of 4 KiB.
void prefer_huge_pages(void* memory, size_t bytes);

template <class Task>
void parallel_for(int64_t tasks, int threads, Task task) {
  run_parallel(
      tasks, threads, [](void* context, int64_t i) { (*static_cast<Task*>(context))(i); }, &task);
}

}  // namespace kernelpose::cpu
