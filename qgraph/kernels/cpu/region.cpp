// Runs of regions: the walk through the steps with the pool's threads, and what Python calls.
//
// The caller alone walks.  The steps of a phase are one job of the pool (pool.cpp), stage by stage.

#include "region.h"

#include <time.h>

#include "pool.hpp"
#include "prepared.hpp"
#include "products.hpp"

namespace qgraph {

// A run.
class Walk {
 public:
  Walk(const Region& region, char* room, int threads, void* const* pointers, int64_t* nanoseconds)
      : helpers_(threads),
        region_(region),
        nanoseconds_(nanoseconds),
        threads_(threads),
        arena_(room),
        shared_(room + region.arena_),
        own_(shared_ + region.shared_),
        tables_(region.private_ ? threads : 1),
        buffers_(region.buffers_.size() * tables_),
        prepared_(region.steps_.size() * threads),
        joined_(threads) {
    long count = region.buffers_.size();
    for (int thread = 0; thread < tables_; thread++)
      for (long i = 0; i < count; i++)
        buffers_[thread * count + i] = address(region.buffers_[i], pointers, thread);
  }

  void run() {
    long count = region_.steps_.size();
    for (long at = 0; at < count;) {
      const Step& step = region_.steps_[at];
      if (!step.work) {
        Here here = here_of(step, 0);
        const qg_ref& test = step.jump.if_zero;
        bool jumps = !given(test) || integer_at(test.dtype, here(test)) == 0;
        at = jumps ? step.jump.target : at + 1;
        continue;
      }
      long end = at + 1;
      while (end < count && region_.steps_[end].work && !region_.steps_[end].leads) end++;
      int64_t begin = nanoseconds_ ? now() : 0;
      phase(at, end);
      if (nanoseconds_) nanoseconds_[at] += now() - begin;
      at = end;
    }
  }

 private:
  static int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
  }

  char* address(const qg_buffer& buffer, void* const* pointers, int thread) const {
    switch (buffer.memory) {
      case QG_GIVEN: return (char*)pointers[buffer.place];
      case QG_FIXED: return (char*)buffer.place;
      case QG_ARENA: return arena_ + buffer.place;
      default: return own_of(thread) + region_.own_ + buffer.place;
    }
  }

  char* own_of(int thread) const { return own_ + thread * (region_.own_ + region_.private_); }

  Here here_of(const Step& step, int thread) const {
    long table = tables_ > 1 ? thread * (long)region_.buffers_.size() : 0;
    return {buffers_.data() + table, shared_ + step.shared_at, own_of(thread) + step.own_at,
            threads_};
  }

  long tasks_of(const Step& step) const {
    if (step.by_each || (step.begun && stage_ == 0) || stage_ >= step.work->stages()) return 0;
    return step.work->tasks(stage_, threads_);
  }

  // Steps `begin` to `end`, stage by stage.
  void phase(long begin, long end) {
    begin_ = begin;
    end_ = end;
    int stages = 1;
    for (long i = begin; i < end; i++)
      if (region_.steps_[i].work->stages() > stages) stages = region_.steps_[i].work->stages();
    for (stage_ = 0; stage_ < stages; stage_++) {
      long count = 0;
      for (long i = begin; i < end; i++) count += tasks_of(region_.steps_[i]);
      phase_number_++;
      if (stage_ == 0) first_ = phase_number_;
      auto task = [](void* walk, int thread, long number) { ((Walk*)walk)->task(thread, number); };
      helpers_.each(task, this, count);
    }
  }

  void task(int thread, long number) {
    uint32_t phase = phase_number_;
    if (joined_[thread] != first_) {
      joined_[thread] = first_;
      own_steps(thread);
    }
    for (long i = begin_;; i++) {
      const Step& step = region_.steps_[i];
      long tasks = tasks_of(step);
      if (number >= tasks) {
        number -= tasks;
        continue;
      }
      Here here = here_of(step, thread);
      uint32_t& prepared = prepared_[thread * region_.steps_.size() + i];
      if (prepared != phase && step.work->prepares(stage_)) step.work->prepare(here, stage_);
      prepared = phase;
      step.work->run(here, stage_, number);
      return;
    }
  }

  void own_steps(int thread) {
    for (long i = begin_; i < end_; i++) {
      const Step& step = region_.steps_[i];
      if (!step.by_each) continue;
      Here here = here_of(step, thread);
      here.threads = 1;
      if (step.work->prepares(0)) step.work->prepare(here, 0);
      long tasks = step.work->tasks(0, 1);
      for (long t = 0; t < tasks; t++) step.work->run(here, 0, t);
    }
  }

  Helpers helpers_;
  const Region& region_;
  int64_t* nanoseconds_;
  int threads_;
  char *arena_, *shared_, *own_;
  int tables_;
  std::vector<char*> buffers_;      // a table for each thread, if it has buffers of its own
  std::vector<uint32_t> prepared_;  // of each thread and step: the last stage it prepared for
  std::vector<uint32_t> joined_;    // of each thread: the last phase in which it did its own steps
  uint32_t phase_number_ = 0;       // of stages
  // Of the stage that is open; a thread reads them once it has taken a task.
  long begin_ = 0, end_ = 0;
  int stage_ = 0;
  uint32_t first_ = 0;  // the number of its first stage
};

void Region::run(void* const* pointers, int threads, int64_t* nanoseconds) {
  int most = cores();
  threads = threads < 1 ? 1 : threads > most ? most : threads;
  Room room = rooms().take(memory(threads));
  Walk(*this, room.memory.get(), threads, pointers, nanoseconds).run();
  rooms().give_back(std::move(room));
}

namespace {

void say(char* words, int64_t room, const char* what) {
  if (words && room > 0) std::snprintf(words, room, "%s", what);
}

}  // namespace
}  // namespace qgraph

using qgraph::Region;

extern "C" {

void* qgraph_region_make(const qg_region* given, char* words, int64_t room) {
  try {
    if (given->version != QG_VERSION) throw qgraph::Mistake("it is of another version");
    if (given->buffers < 0 || given->steps < 0 || given->arena_bytes < 0 ||
        given->private_bytes < 0 || given->pointers < 0)
      throw qgraph::Mistake("a number of things is negative");
    return new Region(*given);
  } catch (const qgraph::Mistake& mistake) {
    qgraph::say(words, room, mistake.words);
  } catch (const std::bad_alloc&) {
    qgraph::say(words, room, "there is too little memory for it");
  }
  return nullptr;
}

int qgraph_region_run(void* region, void* const* pointers, int threads, int64_t* nanoseconds,
                      char* words, int64_t room) {
  try {
    ((Region*)region)->run(pointers, threads, nanoseconds);
    return 0;
  } catch (const std::bad_alloc&) {
    qgraph::say(words, room, "there is too little memory for a run of the region");
    return 1;
  }
}

int64_t qgraph_region_memory(void* region, int threads) {
  return ((Region*)region)->memory(threads < 1 ? 1 : threads);
}

void qgraph_region_free(void* region) { delete (Region*)region; }

int qgraph_multiplies_bytes(void) { return qgraph::multiplies_bytes(); }

const char* qgraph_instructions(void) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#elif defined(__aarch64__)
  return "neon";
#else
  return "generic";
#endif
}

}  // extern "C"
