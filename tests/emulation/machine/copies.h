// Copies that threads began and that arrive later, and the barriers that tell when: between machine.cpp and copies.cpp.
#pragma once

#include "machine.h"

namespace emulation {

// The thread that runs stops until another one wakes it.
void sleep_until_woken(const char* what);
void wake(Thread* thread);

namespace copies {

void begin_block();
// Called when no thread can run: what they wait for arrives, and no more. Returns whether a thread can run now.
bool arrive_at_last();
// What must not be under way when a thread ends, and when all of a block have.
void check_ended(const Thread& thread);
void check_block_ended();

}  // namespace copies
}  // namespace emulation
