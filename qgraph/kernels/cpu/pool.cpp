// Threads for short jobs that follow one another closely.
//
// The caller works too, takes whatever tasks are left, and in the end waits only for threads that
// have begun one.  OpenMP's barrier waits for every thread of a team, also for one that other
// processes keep from its core: with both cores busy a job of 50 us took 2 ms.
//
// A thread without work spins for a while before it sleeps: on a virtual machine waking a core
// takes 100 us, and the next job is usually nearer than that.

#include "pool.hpp"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>

namespace qgraph {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kSpinning = std::chrono::milliseconds(2);
constexpr long kStack = 256 << 10;  // of a thread: what tasks need beyond lies in their scratch

struct Job {
  void (*help)(void*, int);
  void* data;
  std::atomic<int> joined{0};
  int wanted;  // helpers
};

class Pool {
 public:
  const pid_t owner = getpid();

  bool run(void (*lead)(void*), void (*help)(void*, int), void* data, int threads) {
    if (busy_.test_and_set()) return false;  // another caller has the threads
    Job job{help, data, {}, threads - 1};
    grow(threads - 1);
    caller_ = sched_getcpu();
    job_ = &job;
    number_++;
    if (asleep_ > 0) {
      std::lock_guard lock(mutex_);
      awake_.notify_all();
    }
    lead(data);
    job_ = nullptr;
    // A thread says that it is inside before it looks for the job: each that found it is seen.
    for (int i = 0; inside_ > 0; i++) i < 1000 ? pause() : (void)sched_yield();
    busy_.clear();
    return true;
  }

 private:
  void grow(int wanted) {
    pthread_attr_t small;
    if (made_ >= wanted || pthread_attr_init(&small) != 0) return;
    pthread_attr_setdetachstate(&small, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&small, kStack);
    auto body = [](void* pool) -> void* {
      ((Pool*)pool)->wait_for_jobs();
      return nullptr;
    };
    pthread_t thread;
    while (made_ < wanted && pthread_create(&thread, &small, body, this) == 0) made_++;
    pthread_attr_destroy(&small);  // if no more threads are to be had, those there are will do
  }

  // Left to itself Linux may keep a thread that spins on the core of the one that it waits for.
  static void stay_off(int core) {
    cpu_set_t allowed;
    if (core < 0 || sched_getaffinity(getpid(), sizeof(allowed), &allowed) != 0) return;
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
        if (i % 64 != 63) continue;
        sched_yield();  // MLX's own threads, which compute what the next job waits for, go first
        if (Clock::now() < until) continue;
        std::unique_lock lock(mutex_);
        asleep_++;
        awake_.wait(lock, [&] { return number_ != seen; });
        asleep_--;
      }
      seen = number_;
      if (caller_ != avoided) stay_off(avoided = caller_);
      inside_++;
      if (Job* job = job_) {
        int mine = ++job->joined;
        if (mine <= job->wanted) job->help(job->data, mine);
      }
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

// The threads of a process never end, and a child after `fork` has none of them: it gets its own.
Pool* own_pool() {
  Pool* current = pool;
  if (current && current->owner == getpid()) return current;
  Pool* fresh = new (std::nothrow) Pool;
  if (!fresh) return nullptr;
  if (pool.compare_exchange_strong(current, fresh)) return fresh;
  delete fresh;
  return current;
}

struct Tasks {
  void (*task)(void*, long);
  void* data;
  long count;
  std::atomic<long> next{0};

  void work() {
    for (long i; (i = next.fetch_add(1)) < count;) task(data, i);
  }
};

}  // namespace

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int cores() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return 1;
  return CPU_COUNT(&allowed) > 0 ? CPU_COUNT(&allowed) : 1;
}

void together(void (*lead)(void*), void (*help)(void*, int), void* data, int threads) {
  Pool* threads_of_ours = threads > 1 ? own_pool() : nullptr;
  if (!threads_of_ours || !threads_of_ours->run(lead, help, data, threads)) lead(data);
}

void for_each(void (*task)(void*, long), void* data, long count, int threads) {
  Tasks tasks{task, data, count};
  auto lead = [](void* t) { ((Tasks*)t)->work(); };
  auto help = [](void* t, int) { ((Tasks*)t)->work(); };
  together(lead, help, &tasks, count > 1 ? threads : 1);
}

}  // namespace qgraph
