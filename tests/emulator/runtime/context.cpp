#include "context.h"

#include <cstdint>

#ifndef __x86_64__
#include <ucontext.h>
#endif

extern "C" {
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t*);
}

#ifdef __x86_64__
// swapcontext saves the signal mask with a system call; a fiber needs its registers alone.
extern "C" [[gnu::visibility("hidden")]] void kp_switch_stack(void** save, void* load);
asm(R"(
.text
.type kp_switch_stack, @function
.hidden kp_switch_stack
.globl kp_switch_stack
kp_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size kp_switch_stack, .-kp_switch_stack
)");
#endif

namespace kernelpose::emulator {

Context* Context::previous_ = nullptr;

void Context::prepare(void* stack, size_t bytes, void (*entry)()) {
  bottom_ = stack;
  size_ = bytes;
  fake_stack_ = nullptr;
#ifdef __x86_64__
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes);
  *--top = nullptr;  // where entry would return to; also aligns the stack as a call does
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  pointer_ = top;
#else
  ucontext_t* context = static_cast<ucontext_t*>(pointer_);
  if (context == nullptr) pointer_ = context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
#endif
}

void Context::switch_to(Context& next, bool last) {
  previous_ = this;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, next.bottom_, next.size_);
  }
#ifdef __x86_64__
  kp_switch_stack(&pointer_, next.pointer_);
#else
  if (pointer_ == nullptr) pointer_ = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(pointer_), static_cast<ucontext_t*>(next.pointer_));
#endif
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(fake_stack_, &previous_->bottom_, &previous_->size_);
  }
}

void Context::started() {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(nullptr, &previous_->bottom_, &previous_->size_);
  }
}

}  // namespace kernelpose::emulator
