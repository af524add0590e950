// Threads that compute one step together.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace lockstep {

// A step as one of its threads sees it: who it is, and how it waits for the others and shares work with them.
class Team {
 public:
  Team(int num_threads, int num_counters);

  // Waits until every thread is here. Spins for a moment, then gives its core away while it waits.
  void wait();

  int num_threads() const { return num_threads_; }

  // The next number that no thread of this phase has had. `phase` counts up from 0 in every thread alike.
  int next(int phase) { return counters_[phase].value.fetch_add(1, std::memory_order_relaxed); }

 private:
  struct alignas(64) Line {
    std::atomic<int> value{0};
  };
  int num_threads_;
  Line arrived_, round_;
  std::vector<Line> counters_;
};

// [begin, end) of `total` things for one of `num_threads`: parts differ by one at most.
struct Range {
  int begin, end;
};
inline Range share(int total, int thread, int num_threads) {
  return {static_cast<int>(static_cast<int64_t>(total) * thread / num_threads),
          static_cast<int>(static_cast<int64_t>(total) * (thread + 1) / num_threads)};
}

// Threads that wait for work: the caller is thread 0, the others are kept, each on a core of its own.
//
// Between calls they spin for a moment, since the next step of a busy engine comes soon, and then sleep.
// A pool serves one caller at a time; a second one waits.
class Pool {
 public:
  // `cores`: those that the process may run on; thread i stays on cores[i]. The caller's thread is never bound: what
  // it starts later would inherit that.
  explicit Pool(const std::vector<int>& cores);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int max_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls work(thread, team) on `num_threads` threads and returns when all are done. `work` must not throw.
  template <class Work>
  void run(int num_threads, int num_phases, const Work& work) {
    Team team(num_threads, num_phases);
    Job job{&team, &work, [](const void* function, int thread, Team& with) {
              (*static_cast<const Work*>(function))(thread, with);
            }};
    run_job(job);
  }

 private:
  struct Job {
    Team* team;
    const void* work;
    void (*call)(const void* work, int thread, Team& team);
  };

  void run_job(const Job& job);
  void serve(int thread, int core);

  std::mutex callers_;
  std::vector<std::thread> workers_;
  std::mutex sleeping_;
  std::condition_variable wake_;
  Job job_{};
  std::atomic<uint64_t> posted_{0};  // number of the latest job, changed under sleeping_
  std::atomic<int> busy_{0};         // workers that have not finished it
  bool stopping_ = false;
};

}  // namespace lockstep
