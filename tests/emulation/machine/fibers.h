// Fibers: functions with a stack of their own, which go on where they left off.
#pragma once

#include <csetjmp>
#include <ucontext.h>

namespace emulation {

// A fiber begins by setcontext, which can choose a stack but asks the operating system each time; afterwards it is left
// and entered by _setjmp and _longjmp, which do not. Below its stack is memory that cannot be accessed.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Begins anew at the next enter; `run` must not return.
  void prepare(void (*run)());
  // Leaves the fiber that runs, whose state goes to `from`, for this one.
  void enter(jmp_buf& from);
  jmp_buf& state() { return state_; }

 private:
  static constexpr unsigned long kStackBytes = 256 * 1024, kGuardBytes = 64 * 1024;
  char* stack_ = nullptr;
  bool begun_ = false;
  ucontext_t begin_;
  jmp_buf state_;
};

}  // namespace emulation
