// Threads for short jobs that follow one another closely.
//
// The caller works too, takes whatever tasks are left, and in the end waits only for threads that
// have begun one.  OpenMP's barrier waits for every thread of a team, also for one that other
// processes keep from its core: with both cores busy a job of 50 us took 2 ms.
//
// A thread without work spins for a while before it sleeps: on a virtual machine waking a core
// takes 100 us, and the next job is usually nearer than that.

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

using Task = void (*)(void* data, long number);
using Clock = std::chrono::steady_clock;

constexpr auto kSpinning = std::chrono::milliseconds(2);

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  Task task;
  void* data;
  long count;
  std::atomic<long> next{0};

  void work() {
    for (long i; (i = next.fetch_add(1)) < count;) task(data, i);
  }
};

class Pool {
 public:
  const pid_t owner = getpid();

  // Run `count` tasks on up to `threads` threads, the caller's among them.
  void run(Task task, void* data, long count, int threads) {
    Job job{task, data, count};
    if (threads > 1 && count > 1 && !busy_.test_and_set()) {
      grow(threads - 1);
      caller_ = sched_getcpu();
      job_ = &job;
      number_++;
      if (asleep_ > 0) {
        std::lock_guard lock(mutex_);
        awake_.notify_all();
      }
      job.work();
      job_ = nullptr;
      // A thread says that it is inside before it looks for the job: each that found it is seen.
      for (int i = 0; inside_ > 0; i++) i < 1000 ? pause() : std::this_thread::yield();
      busy_.clear();
    } else {
      job.work();  // another caller has the threads, or they are not wanted
    }
  }

 private:
  void grow(int wanted) {
    try {
      for (; made_ < wanted; made_++) std::thread([this] { wait_for_jobs(); }).detach();
    } catch (const std::system_error&) {
      // No more threads are to be had: those there are will do.
    }
  }

  // Left to itself Linux may keep a thread that spins on the core of the one that it waits for.
  static void stay_off(int core) {
    cpu_set_t allowed;
    if (sched_getaffinity(getpid(), sizeof(allowed), &allowed) != 0) return;
    CPU_CLR(core, &allowed);
    if (CPU_COUNT(&allowed) > 0) sched_setaffinity(0, sizeof(allowed), &allowed);
  }

  void wait_for_jobs() {
    uint64_t seen = 0;
    int avoided = -1;
    auto until = Clock::now() + kSpinning;
    for (;;) {
      for (int i = 0; number_ == seen; i++) {
        pause();
        if (i % 64 != 63 || Clock::now() < until) continue;
        std::unique_lock lock(mutex_);
        asleep_++;
        awake_.wait(lock, [&] { return number_ != seen; });
        asleep_--;
      }
      seen = number_;
      if (caller_ != avoided) stay_off(avoided = caller_);
      inside_++;
      if (Job* job = job_) job->work();
      inside_--;
      until = Clock::now() + kSpinning;
    }
  }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::atomic<Job*> job_{nullptr};
  std::atomic<uint64_t> number_{0};
  std::atomic<int> inside_{0}, asleep_{0}, caller_{-1};
  std::mutex mutex_;
  std::condition_variable awake_;
  int made_ = 0;
};

std::atomic<Pool*> pool{nullptr};

}  // namespace

// The threads of a process never end, and a child after `fork` has none of them: it gets its own.
extern "C" void qgraph_for_each(Task task, void* data, long count, int threads) {
  Pool* current = pool;
  if (!current || current->owner != getpid()) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(current, fresh))
      current = fresh;
    else
      delete fresh;
  }
  current->run(task, data, count, threads);
}
