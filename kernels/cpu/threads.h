// Sharing one call's work between threads.
#pragma once

#include <cstdint>
#include <functional>

namespace dcngen_cpu {

struct Threads {
  int useful;  // at most this many do something: none whose share would not be worth starting it
  int wanted;  // what the caller of the library allows
};

// For `work` multiply-adds; wanted <= 0 means all cores.
Threads threads_for(double work, int wanted);

// Calls run(worker, first, last) for consecutive ranges that together make [0, total), on up to threads.useful threads,
// the caller's among them, and returns when all ranges are done. worker < threads.useful tells apart what runs at the
// same time. run must not throw. Threads claim range after range, so none waits for a slower one before the end.
//
// Where the process has an OpenMP runtime that everyone can see, as every process with torch in it has, its pool does
// the work. Its idle threads spin for milliseconds after each parallel region, and threads of our own would queue up
// behind them: between two torch operators, 2.7 ms with the pool against 4.2 with own threads and 5.2 with one.
// Elsewhere, and after a fork, which no OpenMP pool survives, threads are started for the call (7 microseconds for a
// start and a join). The caller does not wait for one that has got no core before the work is gone: on a busy machine
// such a call is never slower than on one thread, where fixed shares took up to 7 times as long.
void share_out(int64_t total, Threads threads, const std::function<void(int worker, int64_t first, int64_t last)>& run);

}  // namespace dcngen_cpu
