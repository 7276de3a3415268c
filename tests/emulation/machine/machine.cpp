// Blocks and their threads: who runs next, who waits for whom, and shared memory. Copies are in copies.cpp.
#include "machine.h"

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <string>

#include "copies.h"
#include "fibers.h"
#include "races.h"

namespace emulation {

Thread* current = nullptr;
Index thread_index, block_index, block_size, grid_size;

namespace {

constexpr int kMostThreads = 1024;
constexpr int kGap = 256;  // around what a block has of shared memory; nothing may be written there
constexpr char kOfGap = '\x5a';
constexpr uint16_t kNeverWritten = 0xffc1;  // a NaN of every type, and an integer that is none of use

struct Place : Thread, Fiber {};

// What stays from block to block: stacks are expensive.
Place threads[kMostThreads];
Warp warps[kMostThreads / 32];
alignas(1024) char memory[kSharedBegin + kMostSharedBytes + 2 * kGap];  // of an address: memory[address]

int dynamic_bytes = 0, static_begin = 0, static_end = 0;
struct StaticVariable {
  int site, at;
};
std::vector<StaticVariable> static_variables;

// Threads that can run. Which of them does, and in which order those go on that waited together, differs from block to
// block, and by what the caller chose: what depends on it is a mistake.
std::deque<Place*> ready;
bool newest_first = false, descending = false;
unsigned chosen_order = 0;

int running = 0;  // threads that have not ended
int at_barrier = 0;
bool barrier_result = false, barrier_of_now = false;
const char* barrier_name = nullptr;

jmp_buf outside;  // where a block was begun: left by a jump when it has ended, or failed
enum { kEnded = 1, kFailed = 2 };
std::string failure;
void (*thread_function)(const void*) = nullptr;
const void* thread_argument = nullptr;

Place& place_of(Thread* thread) { return *static_cast<Place*>(thread); }

std::string who_waits() {
  std::map<std::string, int> at;
  for (const Place& thread : threads) {
    if (!thread.ended && thread.waits_for != nullptr) ++at[thread.waits_for];
  }
  std::string text;
  for (const auto& [name, count] : at) text += (text.empty() ? "" : ", ") + std::to_string(count) + " at " + name;
  return text;
}

// Never returns to the fiber that calls it unless that is the next one.
void run_next(jmp_buf& from) {
  if (running == 0) {
    copies::check_block_ended();
    _longjmp(outside, kEnded);
  }
  if (ready.empty() && !copies::arrive_at_last()) {
    fail("threads wait for others that never come: %s", who_waits().c_str());
  }
  Place* const next = newest_first ? ready.back() : ready.front();
  newest_first ? ready.pop_back() : ready.pop_front();
  if (current == next) return;
  current = next;
  thread_index = next->index;
  next->enter(from);
}

void let_run(Place* first, int count, unsigned mask) {
  for (int i = 0; i < count; ++i) {
    const int at = descending ? count - 1 - i : i;
    if (mask >> (at % 32) & 1 && &first[at] != current && !first[at].ended) {
      first[at].waits_for = nullptr;
      ready.push_back(&first[at]);
    }
  }
}

void release_barrier() {
  at_barrier = 0;
  barrier_result = barrier_of_now;
  barrier_of_now = false;
  races::block_barrier();
  for (Warp& warp : warps) ++warp.barriers;
  let_run(threads, block_size.x, ~0u);
}

void run_thread() {
  thread_function(thread_argument);
  Place& self = place_of(current);
  copies::check_ended(self);
  Warp& warp = *self.warp;
  if (warp.arrived != 0 && warp.mask >> self.lane & 1) fail("it ended, but its warp waits for it at %s", warp.name);
  warp.running &= ~(1u << self.lane);
  self.ended = true;
  --running;
  if (running > 0 && at_barrier == running) release_barrier();
  run_next(self.state());
}

void fill_unwritten(int begin, int bytes) {
  for (int i = 0; i < bytes; ++i) memory[begin + i] = static_cast<char>(kNeverWritten >> 8 * (i % 2));
}

void begin_block(const Grid& grid, unsigned number) {
  block_index.x = number;
  const unsigned order = chosen_order ^ (number * 2654435761u >> 13);  // not by odd and even alone
  descending = order & 1, newest_first = order & 2;
  ready.clear();
  std::memset(memory, kOfGap, sizeof memory);
  fill_unwritten(kSharedBegin, static_cast<int>(grid.shared_bytes));
  dynamic_bytes = static_cast<int>(grid.shared_bytes);
  static_begin = static_end = (kSharedBegin + dynamic_bytes + 2 * kGap - 1) / kGap * kGap;
  static_variables.clear();
  copies::begin_block();
  races::begin_block();
  running = static_cast<int>(grid.threads.x);
  at_barrier = 0, barrier_of_now = false;
  for (Warp& warp : warps) warp = Warp();
  for (int i = 0; i < running; ++i) {
    Place& thread = threads[i];
    static_cast<Thread&>(thread) = Thread();
    thread.index.x = i, thread.lane = i % 32, thread.warp = &warps[i / 32], thread.ended = false;
    thread.warp->running |= 1u << thread.lane;
    thread.prepare(run_thread);
  }
  current = nullptr;
  let_run(threads, running, ~0u);
}

void check_gaps() {
  const auto untouched = [](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      if (memory[i] != kOfGap) fail("shared memory was written outside what the block has, at %d", i);
    }
  };
  untouched(0, kSharedBegin);
  untouched(kSharedBegin + dynamic_bytes, static_begin);
  untouched(static_end, sizeof memory);
}

// While a grid runs, an access of memory that is not there is an error of the thread, not the end of the process.
class BadAccesses {
 public:
  BadAccesses() {
    static char stack[64 * 1024];  // the thread's own may be what it has used up
    const stack_t own = {stack, 0, sizeof stack};
    sigaltstack(&own, &stack_before_);
    struct sigaction action = {};
    action.sa_sigaction = [](int, siginfo_t* info, void*) { fail("an access of memory at %p", info->si_addr); };
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~BadAccesses() {
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &before_[i], nullptr);
    sigaltstack(&stack_before_, nullptr);
  }

 private:
  static constexpr int kSignals[2] = {SIGSEGV, SIGBUS};
  struct sigaction before_[2];
  stack_t stack_before_;
};

// Whether no thread failed.
bool run_block() {
  switch (_setjmp(outside)) {
    case kFailed: return false;
    case kEnded: current = nullptr; check_gaps(); return true;
    default: jmp_buf unused; run_next(unused); return false;
  }
}

}  // namespace

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  failure = "block " + std::to_string(block_index.x);
  if (current != nullptr) failure += ", thread " + std::to_string(current->index.x);
  failure += std::string(": ") + text;
  _longjmp(outside, kFailed);
}

const char* last_failure() { return failure.c_str(); }

void sleep_until_woken(const char* what) {
  Place& self = place_of(current);
  self.waits_for = what;
  run_next(self.state());
}

void wake(Thread* thread) {
  thread->waits_for = nullptr;
  ready.push_back(&place_of(thread));
}

void meet_lanes(unsigned mask, const char* name, void* brought, Together together) {
  Warp& warp = *current->warp;
  if (!(mask >> current->lane & 1)) fail("%s for lanes %08x, called by lane %d", name, mask, current->lane);
  if (warp.arrived == 0) warp.mask = mask, warp.together = together, warp.name = name;
  if (warp.mask != mask || warp.together != together) {
    fail("lanes of a warp meet at different places: %s and %s", warp.name, name);
  }
  if (const unsigned ended = mask & ~warp.running) {
    fail("%s for lane %d, which has ended or never was", name, __builtin_ctz(ended));
  }
  warp.brought[current->lane] = brought;
  warp.arrived |= 1u << current->lane;
  if (warp.arrived != mask) return sleep_until_woken(name);
  if (together != nullptr) together(warp.brought, mask);
  if (together == nullptr && mask == warp.running) ++warp.barriers;
  warp.arrived = 0;
  let_run(&threads[32 * (&warp - warps)], 32, mask);
}

bool meet_block(const char* name, bool brought) {
  if (at_barrier > 0 && barrier_name != name) fail("threads of a block meet at different barriers");
  barrier_name = name;
  barrier_of_now |= brought;
  if (++at_barrier < running) {
    sleep_until_woken(name);
  } else {
    release_barrier();
  }
  return barrier_result;
}

char* shared(uint32_t address, int bytes, int alignment) {
  if (address % alignment != 0) {
    fail("an access of %d bytes at shared address %u, not a multiple of %d", bytes, address, alignment);
  }
  const int64_t end = int64_t{address} + bytes;
  const bool inside = (address >= kSharedBegin && end <= kSharedBegin + dynamic_bytes) ||
                      (int64_t{address} >= static_begin && end <= static_end);
  if (!inside) {
    fail("an access of %d bytes at shared address %u: the block has %d bytes from %u on", bytes, address, dynamic_bytes,
         kSharedBegin);
  }
  return memory + address;
}

const char* shared_to_read(uint32_t address, int bytes, int alignment, const Thread& by) {
  const char* const from = shared(address, bytes, alignment);
  races::read(address, bytes, by);
  return from;
}

char* shared_to_write(uint32_t address, int bytes, int alignment, const Thread& by) {
  char* const to = shared(address, bytes, alignment);
  races::write(address, bytes, by);
  return to;
}

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - memory);
}

char* dynamic_shared(int alignment) {
  if (kSharedBegin % alignment != 0) fail("shared memory cannot be aligned to %d bytes", alignment);
  return memory + kSharedBegin;
}

void* static_shared(int site, int bytes, int alignment) {
  for (const StaticVariable& variable : static_variables) {
    if (variable.site == site) return memory + variable.at;
  }
  const int at = (static_end + alignment - 1) / alignment * alignment;
  if (at + bytes + kGap > static_cast<int>(sizeof memory)) fail("too much shared memory");
  fill_unwritten(at, bytes);
  static_end = at + bytes;
  static_variables.push_back({site, at});
  return memory + at;
}

bool run_grid(const Grid& grid, void (*thread)(const void*), const void* argument) {
  thread_function = thread, thread_argument = argument;
  block_size = grid.threads, grid_size = grid.blocks;
  const BadAccesses watched;
  for (unsigned number = 0; number < grid.blocks.x; ++number) {
    begin_block(grid, number);
    if (!run_block()) return false;
  }
  return true;
}

}  // namespace emulation

// One of four orders for every block.
extern "C" __attribute__((visibility("default"))) void emulation_order(int order) {
  emulation::chosen_order = static_cast<unsigned>(order);
}
