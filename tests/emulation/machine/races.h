// Accesses of shared memory that nothing keeps in order: between machine.cpp, copies.cpp and races.cpp.
#pragma once

#include "machine.h"

namespace emulation::races {

void begin_block();
void block_barrier();  // all threads have passed one

void read(uint32_t address, int bytes, const Thread& by);
void write(uint32_t address, int bytes, const Thread& by);
// The thread has begun something that will write there.
void will_write(uint32_t address, int bytes, const Thread& by);
// The copy engine has written there: all that wait for its barrier may read it.
void written_by_engine(uint32_t address, int bytes);
// The copy engine will read there for the thread: what others wrote has to be in order, and visible to it.
void engine_will_read(uint32_t address, int bytes, const Thread& by);

}  // namespace emulation::races
