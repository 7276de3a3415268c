// Of every two bytes of shared memory: who wrote and read them last, and how many barriers its warp and the block had
// passed. Two accesses by different threads, one of them a write, are in order if a barrier of both came between: of
// the warp (__syncwarp) if they are of one, else of the block. That lanes meet for a matrix or a shuffle orders
// nothing.
#include "races.h"

namespace emulation::races {
namespace {

struct Access {
  const Thread* by = nullptr;
  unsigned warp_barriers, block_barriers;
};

struct Cell {
  unsigned block = 0;  // that the rest is of
  unsigned fences;     // of the writer, before it wrote
  Access written;
  Access read[2];  // the last, and the last before it by another warp, or else by another thread
};

Cell cells[(kSharedBegin + kMostSharedBytes + 4096) / 2];
unsigned block = 0, block_barriers = 0;

inline Cell& cell_at(uint32_t number) {
  Cell& cell = cells[number];
  if (cell.block != block) cell = Cell(), cell.block = block;
  return cell;
}

[[noreturn, gnu::noinline]] void fail_because_of(const Access& before, const Thread& by, const char* what) {
  fail("thread %u %s thread %u, and no barrier is between", by.index.x, what, before.by->index.x);
}

inline void check(const Access& before, const Thread& by, const char* what) {
  if (before.by == nullptr || before.by == &by) return;
  const bool in_order = before.by->warp == by.warp ? before.warp_barriers < by.warp->barriers
                                                   : before.block_barriers < block_barriers;
  if (!in_order) fail_because_of(before, by, what);
}

inline void check_write(const Cell& cell, const Thread& by) {
  check(cell.written, by, "writes to shared memory over");
  for (const Access& access : cell.read) check(access, by, "writes to shared memory what is read by");
}

// Calls visit(cell) for those of an access.
template <typename Visit>
void for_cells(uint32_t address, int bytes, Visit visit) {
  for (uint32_t number = address / 2; number < (address + bytes) / 2; ++number) visit(cell_at(number));
}

}  // namespace

void begin_block() {
  ++block;
  block_barriers = 0;
}

void block_barrier() { ++block_barriers; }

void read(uint32_t address, int bytes, const Thread& by) {
  for_cells(address, bytes, [&](Cell& cell) {
    check(cell.written, by, "reads in shared memory what is written by");
    Access &last = cell.read[0], &other = cell.read[1];
    const bool same = last.by == nullptr || last.by == &by;
    if (!same && (last.by->warp != by.warp || other.by == nullptr || other.by->warp == by.warp)) other = last;
    last = {&by, by.warp->barriers, block_barriers};
  });
}

void write(uint32_t address, int bytes, const Thread& by) {
  for_cells(address, bytes, [&](Cell& cell) {
    check_write(cell, by);
    cell.written = {&by, by.warp->barriers, block_barriers};
    cell.fences = by.fences;
  });
}

void will_write(uint32_t address, int bytes, const Thread& by) {
  for_cells(address, bytes, [&](Cell& cell) { check_write(cell, by); });
}

void written_by_engine(uint32_t address, int bytes) {
  for_cells(address, bytes, [](Cell& cell) { cell.written = Access(); });
}

void engine_will_read(uint32_t address, int bytes, const Thread& by) {
  for_cells(address, bytes, [&](Cell& cell) {
    check(cell.written, by, "stores by the copy engine what is written by");
    if (cell.written.by != nullptr && cell.written.by->fences == cell.fences) {
      fail("the copy engine stores what thread %u wrote without a fence after it", cell.written.by->index.x);
    }
  });
}

}  // namespace emulation::races
