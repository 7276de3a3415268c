#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace dcngen_cpu {

namespace {

// Multiply-adds that a core does in about 50 microseconds, several times what starting a thread costs.
constexpr double kLeastWork = 1.5e6;
constexpr int64_t kRangesPerThread = 8;

using Run = std::function<void(int, int64_t, int64_t)>;

// What the threads of one call share. It outlives the call where a helper starts late; such a helper finds no range
// left and touches nothing else.
class Job {
 public:
  Job(int64_t total, int threads, const Run& run)
      : total_(total), ranges_(std::min(total, kRangesPerThread * threads)), threads_(threads), run_(run) {}

  // Claims ranges until none is left.
  void work() {
    const int worker = workers_.fetch_add(1);
    if (worker >= threads_) return;
    for (int64_t i; (i = next_.fetch_add(1)) < ranges_;) {
      run_(worker, begin_of(i), begin_of(i + 1));
      if (done_.fetch_add(1) + 1 == ranges_) {
        const std::lock_guard<std::mutex> lock(mutex_);
        all_done_.notify_one();
      }
    }
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_.load() == ranges_; });
  }

 private:
  int64_t begin_of(int64_t i) const { return total_ / ranges_ * i + std::min(i, total_ % ranges_); }

  const int64_t total_, ranges_;
  const int threads_;
  const Run& run_;  // the caller's; used only while it waits
  std::atomic<int> workers_{0};
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

// A parallel region of whatever OpenMP runtime the process has: GNU's entry point, which LLVM's and Intel's have, too.
using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

ParallelRegion openmp() {
  static const auto found = reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

// A forked child inherits the pool's records but not its threads; a parallel region there would wait for them for ever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

void work_on_own_threads(const std::shared_ptr<Job>& job, int threads) {
  try {
    for (int i = 1; i < threads; ++i) std::thread([job] { job->work(); }).detach();
  } catch (const std::system_error&) {
    // No more threads to be had: those that there are do all ranges.
  }
  job->work();
  job->wait();
}

}  // namespace

Threads threads_for(double work, int wanted) {
  if (wanted <= 0) wanted = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return {static_cast<int>(std::clamp(work / kLeastWork, 1.0, static_cast<double>(wanted))), wanted};
}

void share_out(int64_t total, Threads threads, const Run& run) {
  if (total < 1) return;
  if (threads.useful <= 1 || total == 1) return run(0, 0, total);
  const auto job = std::make_shared<Job>(total, threads.useful, run);
  if (openmp() && !forked) {
    // The whole pool, even where a part would do: GNU's runtime ends the threads that a region leaves out.
    openmp()([](void* data) { static_cast<Job*>(data)->work(); }, job.get(), static_cast<unsigned>(threads.wanted), 0);
  } else {
    work_on_own_threads(job, threads.useful);
  }
}

}  // namespace dcngen_cpu
