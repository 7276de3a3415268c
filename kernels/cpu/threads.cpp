#include "threads.h"

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
  Job(int64_t total, int64_t ranges, const Run& run) : total_(total), ranges_(ranges), run_(run) {}

  void work(int worker) {
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
  const Run& run_;  // the caller's; used only while it waits
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
};

}  // namespace

int threads_for(double work, int wanted) {
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const double worthwhile = std::max(1.0, work / kLeastWork);
  const int most = wanted > 0 ? wanted : cores;
  return worthwhile < most ? static_cast<int>(worthwhile) : most;
}

void share_out(int64_t total, int threads, const Run& run) {
  if (total < 1) return;
  if (threads <= 1 || total == 1) return run(0, 0, total);
  const auto job = std::make_shared<Job>(total, std::min(total, kRangesPerThread * threads), run);
  try {
    for (int worker = 1; worker < threads; ++worker) std::thread([job, worker] { job->work(worker); }).detach();
  } catch (const std::system_error&) {
    // No more threads to be had: those that there are do all ranges.
  }
  job->work(0);
  job->wait();
}

}  // namespace dcngen_cpu
