// Threads for short jobs that follow one another closely.
//
// A job is opened by a ticket, one 64-bit word of the job's number and of the tasks that are left;
// threads take tasks by counting it down.  The caller works too, and in the end waits for the tasks
// that others have begun, not for threads: one that another process keeps from its core, or that
// comes late, is not missed, and cannot take a task of a job that is over.
//
// A thread without work spins for a while before it sleeps: on a virtual machine waking a core
// takes 100 us, and the next job is usually nearer than that.

#include "pool.hpp"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>

namespace qgraph {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr auto kSpinning = std::chrono::milliseconds(2);
constexpr long kStack = 256 << 10;  // of a thread: what tasks need beyond lies in their scratch

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Left to itself Linux may keep a thread that spins on the core of the one that it waits for.
void stay_off(int core) {
  cpu_set_t allowed;
  if (core < 0 || sched_getaffinity(getpid(), sizeof(allowed), &allowed) != 0) return;
  CPU_CLR(core, &allowed);
  if (CPU_COUNT(&allowed) > 0) sched_setaffinity(0, sizeof(allowed), &allowed);
}

}  // namespace

class Pool {
 public:
  const pid_t owner = getpid();

  bool lend(int threads) {
    if (busy_.test_and_set(std::memory_order_acquire)) return false;
    grow(threads - 1);
    helpers_ = threads - 1;
    caller_ = sched_getcpu();
    return true;
  }

  void take_back() { busy_.clear(std::memory_order_release); }

  void each(void (*task)(void*, int, long), void* data, long count) {
    auto begin = Clock::now();
    if (count <= 1 || begin < alone_until_) {
      for (long i = 0; i < count; i++) task(data, 0, i);
      return;
    }
    task_ = task;
    data_ = data;
    count_ = count;
    done_.store(0, std::memory_order_relaxed);
    uint64_t ticket = (uint64_t)++jobs_ << 32 | (uint32_t)count;
    ticket_ = ticket;
    if (asleep_ > 0) {
      std::lock_guard lock(mutex_);
      awake_.notify_all();
    }
    long others = count;
    for (; (uint32_t)ticket; ticket = ticket_.load(std::memory_order_relaxed))
      if (ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_relaxed)) {
        task(data, 0, count - (uint32_t)ticket);
        others--;
      }
    wait_for(others, begin);
  }

 private:
  // A thread that begins a task and is then kept from its core by another process holds up all.
  // Whoever waits longer than its own share of the work took works alone for some time.
  void wait_for(long others, Clock::time_point begin) {
    for (long i = 0; done_.load(std::memory_order_acquire) < others; i++) {
      if (i < 1000) {
        pause();
        continue;
      }
      auto since = Clock::now();
      while (done_.load(std::memory_order_acquire) < others) sched_yield();
      auto late = Clock::now() - since;
      if (late > std::max<Clock::duration>(since - begin, microseconds(100)))
        alone_until_ = since + 8 * late;
    }
  }

  void grow(int wanted) {
    pthread_attr_t small;
    if (made_ >= wanted || pthread_attr_init(&small) != 0) return;
    pthread_attr_setdetachstate(&small, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&small, kStack);
    auto body = [](void* pool) -> void* {
      ((Pool*)pool)->help();
      return nullptr;
    };
    pthread_t thread;
    while (made_ < wanted && pthread_create(&thread, &small, body, this) == 0) made_++;
    pthread_attr_destroy(&small);  // if no more threads are to be had, those there are will do
  }

  // A thread's life.  What it reads of a job before it has a task may be of the next one; then the
  // ticket is another, and it gets none.
  void help() {
    const int number = ++numbers_;
    int avoided = -1;
    auto until = Clock::now() + kSpinning;
    for (long idle = 1;; idle++) {
      uint64_t ticket = ticket_.load(std::memory_order_acquire);
      if ((uint32_t)ticket && number <= helpers_) {
        if (caller_ != avoided) stay_off(avoided = caller_);
        if (ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acquire)) {
          task_(data_, number, count_ - (uint32_t)ticket);
          done_.fetch_add(1, std::memory_order_release);
          idle = 0, until = Clock::now() + kSpinning;
        }
        continue;
      }
      pause();
      if (idle % 64) continue;
      sched_yield();  // MLX's own threads, which compute what the next job waits for, go first
      if (Clock::now() < until) continue;
      std::unique_lock lock(mutex_);
      asleep_++;
      awake_.wait(lock, [&] { return (uint32_t)ticket_.load() && number <= helpers_; });
      asleep_--;
      until = Clock::now() + kSpinning;
    }
  }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::atomic<int> helpers_{0}, caller_{-1}, numbers_{0}, asleep_{0};
  std::mutex mutex_;
  std::condition_variable awake_;
  int made_ = 0;
  Clock::time_point alone_until_{};
  // Of the job that is open; a thread reads them once it has taken a task.
  void (*task_)(void*, int, long) = nullptr;
  void* data_ = nullptr;
  long count_ = 0;
  uint32_t jobs_ = 0;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<long> done_{0};  // tasks that helpers have done
};

namespace {

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

}  // namespace

Helpers::Helpers(int threads) : pool_(threads > 1 ? own_pool() : nullptr) {
  if (pool_ && !pool_->lend(threads)) pool_ = nullptr;
}

Helpers::~Helpers() {
  if (pool_) pool_->take_back();
}

void Helpers::each(void (*task)(void*, int, long), void* data, long count) {
  if (pool_) return pool_->each(task, data, count);
  for (long i = 0; i < count; i++) task(data, 0, i);
}

int cores() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return 1;
  return CPU_COUNT(&allowed) > 0 ? CPU_COUNT(&allowed) : 1;
}

}  // namespace qgraph
