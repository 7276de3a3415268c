// Sharing one call's work between threads.
#pragma once

#include <cstdint>
#include <functional>

namespace dcngen_cpu {

// How many threads to use for `work` multiply-adds: no more than `wanted` (all cores where <= 0), and none whose share
// would be smaller than the cost of starting it.
int threads_for(double work, int wanted);

// Calls run(i) for i in [0, count), each on its own thread, the last on the caller's; returns when all are done.
// Threads are started for the call and joined: nothing outlives it, so a fork afterwards is safe and no other thread
// pool of the process (OpenMP's of any vendor) is touched. Where the system refuses a thread, the caller does its share.
// run must not throw.
void run_threads(int count, const std::function<void(int)>& run);

// The i-th of `count` nearly equal parts of [0, total): its first element (i == count gives total).
inline int64_t share_begin(int64_t total, int count, int i) {
  return total / count * i + (total % count < i ? total % count : i);
}

}  // namespace dcngen_cpu
