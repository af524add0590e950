#include "pool.h"

#include <chrono>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lockstep {
namespace {

// Checks of a flag between two looks at the clock: about a microsecond.
constexpr int kSpins = 64;
constexpr std::chrono::microseconds kBetweenJobs{50};
// A wait within a step is short, unless somebody else took a core: then spinning keeps that core from the thread that
// everybody waits for.
constexpr std::chrono::microseconds kWithinJob{20};

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// True once `done` says so, false when the time is over.
template <class Done>
bool spin(std::chrono::microseconds limit, const Done& done) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point end = Clock::now() + limit;
  do {
    for (int i = 0; i < kSpins; ++i) {
      if (done()) return true;
      relax();
    }
  } while (Clock::now() < end);
  return done();
}

void stay_on(int core) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#else
  (void)core;
#endif
}

}  // namespace

Team::Team(int num_threads, int num_counters) : num_threads_(num_threads), counters_(num_counters) {}

void Team::wait() {
  if (num_threads_ == 1) return;
  const int round = round_.value.load(std::memory_order_relaxed);
  if (arrived_.value.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
    arrived_.value.store(0, std::memory_order_relaxed);
    round_.value.store(round + 1, std::memory_order_release);
    return;
  }
  const auto passed = [&] { return round_.value.load(std::memory_order_acquire) != round; };
  while (!spin(kWithinJob, passed)) std::this_thread::yield();
}

Pool::Pool(const std::vector<int>& cores) {
  for (size_t i = 1; i < cores.size(); ++i) {
    workers_.emplace_back([this, i, core = cores[i]] { serve(static_cast<int>(i), core); });
  }
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(sleeping_);
    stopping_ = true;
    posted_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::run_job(const Job& job) {
  std::lock_guard<std::mutex> one_at_a_time(callers_);
  if (job.team->num_threads() > 1) {
    std::lock_guard<std::mutex> lock(sleeping_);
    job_ = job;
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    posted_.fetch_add(1, std::memory_order_release);
  }
  if (job.team->num_threads() > 1) wake_.notify_all();
  job.call(job.work, 0, *job.team);
  if (job.team->num_threads() > 1) {
    // The team lies on the caller's stack: nobody may look at it after this.
    const auto done = [&] { return busy_.load(std::memory_order_acquire) == 0; };
    while (!spin(kWithinJob, done)) std::this_thread::yield();
  }
}

void Pool::serve(int thread, int core) {
  stay_on(core);
  uint64_t seen = 0;
  const auto posted = [&] { return posted_.load(std::memory_order_acquire) != seen; };
  while (true) {
    if (!spin(kBetweenJobs, posted)) {
      std::unique_lock<std::mutex> lock(sleeping_);
      wake_.wait(lock, posted);
    }
    seen = posted_.load(std::memory_order_acquire);
    Job job;
    {
      std::lock_guard<std::mutex> lock(sleeping_);
      if (stopping_) return;
      job = job_;
    }
    if (thread < job.team->num_threads()) job.call(job.work, thread, *job.team);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace lockstep
