// Sharing one call's work between threads.
#pragma once

#include <cstdint>
#include <functional>

namespace dcngen_cpu {

// How many threads to use for `work` multiply-adds: no more than `wanted` (all cores where <= 0), and none whose share
// would not be worth starting it.
int threads_for(double work, int wanted);

// Calls run(worker, first, last) for consecutive ranges that together make [0, total), on up to `threads` threads, the
// caller's among them, and returns when all ranges are done. worker < threads tells apart what runs at the same time.
// run must not throw.
//
// Threads are started for the call, claim range after range, and leave. The caller does not wait for one that has not
// got a core before the work is gone: on a busy machine, or next to an OpenMP pool whose idle threads spin, a call is
// then never slower than on one thread (handing out fixed shares took 4 to 7 times as long there, and 7 microseconds
// for a start and a join do not matter on a quiet one). Nothing is kept between calls, so a fork finds nothing broken.
void share_out(int64_t total, int threads, const std::function<void(int worker, int64_t first, int64_t last)>& run);

}  // namespace dcngen_cpu
