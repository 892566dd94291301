// Stacks that can be left and come back to; told to the address sanitizer where there is one.
#pragma once

#include <cstddef>

namespace kernelpose::emulator {

class Context {
 public:
  Context() = default;  // of the thread that calls switch_to first
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // The next switch here starts entry(), which must leave by switch_to(..., /*last=*/true).
  void prepare(void* stack, size_t bytes, void (*entry)());
  void switch_to(Context& next, bool last = false);
  static void started();  // first statement of entry()

 private:
  void* pointer_ = nullptr;  // stack pointer; a ucontext_t where the switch is not written out
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  static Context* previous_;
};

}  // namespace kernelpose::emulator
