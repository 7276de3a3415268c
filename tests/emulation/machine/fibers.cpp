#include "fibers.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

namespace emulation {

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes);
}

void Fiber::prepare(void (*run)()) {
  if (stack_ == nullptr) {
    void* const memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
      std::perror("emulation: no memory for a fiber's stack");
      std::abort();
    }
    stack_ = static_cast<char*>(memory) + kGuardBytes;
  }
  getcontext(&begin_);
  begin_.uc_stack.ss_sp = stack_;
  begin_.uc_stack.ss_size = kStackBytes;
  begin_.uc_link = nullptr;
  makecontext(&begin_, run, 0);
  begun_ = false;
}

void Fiber::enter(jmp_buf& from) {
  if (_setjmp(from) != 0) return;
  if (begun_) _longjmp(state_, 1);
  begun_ = true;
  setcontext(&begin_);
}

}  // namespace emulation
