// Copies between global and shared memory that arrive later than asked for, the barriers of the copy engine, and the
// checks of accesses to global memory.
#include "copies.h"

#include <cstring>

#include "races.h"

namespace emulation {
namespace {

struct Barrier {
  uint32_t address;
  int arrivals;  // of a phase
  int missing;   // of this one
  int64_t bytes = 0;  // expected and not arrived; negative where they arrived first
  uint32_t phase = 0;
  std::vector<Thread*> waiting;
};

struct BoxLoad {
  uint32_t to;
  TensorMap map;
  int place[4];
  uint32_t barrier;
};

std::vector<Barrier> barriers;
std::vector<BoxLoad> loads;

struct Range {
  const char *begin, *end;
};
std::vector<Range> announced;

Barrier& barrier_at(uint32_t address) {
  for (Barrier& barrier : barriers) {
    if (barrier.address == address) return barrier;
  }
  fail("there is no barrier at shared address %u", address);
}

int bytes_of_box(const TensorMap& map) {
  return map.value_bytes * map.box[0] * map.box[1] * map.box[2] * map.box[3];
}

void complete_if_due(Barrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
  for (Thread* thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

void perform(const ThreadCopy& copy) {
  char* const to = shared_to_write(copy.to, 16, 16);
  if (copy.bytes > 0) std::memcpy(to, global(copy.from, copy.bytes, 16), copy.bytes);
  std::memset(to + copy.bytes, 0, 16 - copy.bytes);
}

void perform(const BoxStore& store) {
  races::read(store.from, bytes_of_box(*store.map), *current);
  copy_box(*store.map, store.from, store.place, false);
}

// Performs those that are older than the last `pending` groups.
template <typename Copy>
void perform_older(std::vector<Copy>& copies, unsigned group, int pending) {
  size_t done = 0;
  while (done < copies.size() && static_cast<int>(group - copies[done].group) > pending) perform(copies[done++]);
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace

// The address at which a copy fails shows where it was asked for only if it is checked there too.
void begin_copy(uint32_t to, const void* from, int bytes) {
  shared(to, 16, 16);
  races::will_write(to, 16, *current);
  if (bytes > 0) global(from, bytes, 16);
  current->copies.push_back({to, from, bytes, current->copy_group});
}
void commit_copies() { ++current->copy_group; }
void wait_for_copies(int pending) { perform_older(current->copies, current->copy_group, pending); }

void init_barrier(uint32_t address, int arrivals) {
  shared(address, 8, 8);
  for (const Barrier& barrier : barriers) {
    if (barrier.address == address) fail("the barrier at shared address %u is initialised twice", address);
  }
  barriers.push_back({address, arrivals, arrivals, 0, 0, {}});
}

void arrive_and_expect(uint32_t address, int bytes) {
  Barrier& barrier = barrier_at(address);
  barrier.bytes += bytes;
  --barrier.missing;
  complete_if_due(barrier);
}

void wait_for_barrier(uint32_t address, uint32_t parity) {
  while ((barrier_at(address).phase & 1) == (parity & 1)) {
    barrier_at(address).waiting.push_back(current);
    sleep_until_woken("a barrier of the copy engine");
  }
}

void begin_box_load(uint32_t to, const TensorMap& map, const int (&place)[4], uint32_t barrier) {
  barrier_at(barrier);
  races::will_write(to, bytes_of_box(map), *current);
  loads.push_back({to, map, {place[0], place[1], place[2], place[3]}, barrier});
}

void begin_box_store(const TensorMap& map, uint32_t from, const int (&place)[4]) {
  races::engine_will_read(from, bytes_of_box(map), *current);
  current->stores.push_back({&map, from, {place[0], place[1], place[2], place[3]}, current->store_group});
}
void commit_stores() { ++current->store_group; }
void wait_for_stores(int pending) { perform_older(current->stores, current->store_group, pending); }

const void* global(const void* pointer, int bytes, int alignment) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    fail("an access of %d bytes in global memory, not at a multiple of %d", bytes, alignment);
  }
  const char* const begin = static_cast<const char*>(pointer);
  for (const Range& range : announced) {
    if (begin >= range.begin && begin + bytes <= range.end) return pointer;
  }
  if (!announced.empty()) fail("an access of %d bytes in global memory, outside every tensor", bytes);
  return pointer;
}

namespace copies {

void begin_block() {
  barriers.clear();
  loads.clear();
}

bool arrive_at_last() {
  bool woken = false;
  std::vector<BoxLoad> later;
  for (const BoxLoad& load : loads) {
    Barrier& barrier = barrier_at(load.barrier);
    if (barrier.waiting.empty()) {
      later.push_back(load);
      continue;
    }
    copy_box(load.map, load.to, load.place, true);
    races::written_by_engine(load.to, bytes_of_box(load.map));
    barrier.bytes -= bytes_of_box(load.map);
    complete_if_due(barrier);
    woken |= barrier.waiting.empty();
  }
  loads = std::move(later);
  return woken;
}

void check_ended(const Thread& thread) {
  if (!thread.stores.empty()) fail("a thread ended before the copy engine had read what it was to store");
}

void check_block_ended() {
  if (!loads.empty()) fail("a block ended while the copy engine was still writing to its shared memory");
}

}  // namespace copies
}  // namespace emulation

// So many bytes from `begin` on may be accessed; once one such range is known, nothing outside them all may.
extern "C" __attribute__((visibility("default"))) void emulation_announce(const void* begin, int64_t bytes) {
  const char* const first = static_cast<const char*>(begin);
  emulation::announced.push_back({first, first + bytes});
}
extern "C" __attribute__((visibility("default"))) void emulation_forget() { emulation::announced.clear(); }
