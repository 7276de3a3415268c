#include "threads.h"

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

namespace dcngen_cpu {

namespace {
// Starting and joining a thread costs some 15 microseconds; a core does this much in about 50.
constexpr double kLeastWork = 5e5;
}  // namespace

int threads_for(double work, int wanted) {
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const double worthwhile = std::max(1.0, work / kLeastWork);
  const int most = wanted > 0 ? wanted : cores;
  return worthwhile < most ? static_cast<int>(worthwhile) : most;
}

void run_threads(int count, const std::function<void(int)>& run) {
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(count - 1));
  int next = 0;
  try {
    for (; next < count - 1; ++next) threads.emplace_back([&run, next] { run(next); });
  } catch (const std::system_error&) {
    // No more threads to be had: the loop below does the rest.
  }
  for (; next < count; ++next) run(next);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace dcngen_cpu
