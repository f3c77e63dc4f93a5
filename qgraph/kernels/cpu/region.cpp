// Regions: steps made ready, and the walk through them with the pool's threads.
//
// The caller alone walks.  The steps of a phase are one job of the pool (pool.cpp), stage by stage.

#include "region.h"

#include <time.h>

#include <atomic>
#include <cstdlib>
#include <vector>

#include "pool.hpp"
#include "products.hpp"

namespace qgraph {
namespace {

constexpr long kAlign = 64;

struct Step {
  Maker work;  // none: a jump
  qg_jump jump{};
  bool leads = true;  // begins a phase
  bool by_each = false;
  bool begun = false;  // another step of the phase does its first stage
  long shared_at = 0, own_at = 0;  // of its scratch
};

char* aligned_memory(size_t bytes) {
  void* memory = nullptr;
  bytes = up(bytes ? bytes : 1, kAlign);
  return posix_memalign(&memory, kAlign, bytes) == 0 ? (char*)memory : nullptr;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory of a run, lent by whoever ran before: its content means nothing.
struct Room {
  std::unique_ptr<char, Free> memory;
  long bytes = 0;
};

// A few rooms that no run uses.  Who finds the door closed (another thread is there, or was when the
// process forked) does without.
class Rooms {
 public:
  Room take(long bytes) {
    Room room;
    if (!door_.test_and_set(std::memory_order_acquire)) {
      for (Room& kept : kept_)
        if (kept.bytes >= bytes && (!room.memory || kept.bytes < room.bytes)) std::swap(room, kept);
      door_.clear(std::memory_order_release);
    }
    if (!room.memory) {
      room.memory.reset(aligned_memory(bytes));
      if (!room.memory) throw std::bad_alloc();
      room.bytes = bytes;
    }
    return room;
  }

  // Keeps it in place of the smallest.
  void give_back(Room room) {
    if (door_.test_and_set(std::memory_order_acquire)) return;
    Room* smallest = kept_;
    for (Room& kept : kept_)
      if (kept.bytes < smallest->bytes) smallest = &kept;
    if (smallest->bytes < room.bytes) std::swap(*smallest, room);
    door_.clear(std::memory_order_release);
  }

 private:
  std::atomic_flag door_ = ATOMIC_FLAG_INIT;
  Room kept_[4];
};

Rooms& rooms() {
  static Rooms* all = new Rooms;  // never freed: threads may outlive what ends with the process
  return *all;
}

class Region {
 public:
  explicit Region(const qg_region& given)
      : pointers_(given.pointers),
        buffers_(given.buffer, given.buffer + given.buffers),
        steps_(given.steps) {
    check_buffers(given);
    Table table(given);
    for (long i = 0; i < given.steps; i++) {
      try {
        make(table, i, given.step[i]);
      } catch (const Mistake& mistake) {
        throw Mistake("step %ld: %.180s", i, mistake.words);
      }
    }
    for (long i = 1; i < given.steps; i++)
      steps_[i].leads = !steps_[i].work || !steps_[i - 1].work || given.step[i].flags & QG_BARRIER;
    for (const Step& step : steps_)
      if (!step.work && step.jump.target < given.steps) steps_[step.jump.target].leads = true;
    lay_out_scratch();
    arena_ = up(given.arena_bytes, kAlign);
    private_ = up(given.private_bytes, kAlign);
  }

  long memory(int threads) const {
    return arena_ + shared_ + threads * (own_ + private_);
  }

  void run(void* const* pointers, int threads, int64_t* nanoseconds);

 private:
  friend class Walk;

  void check_buffers(const qg_region& given) const {
    for (long i = 0; i < given.buffers; i++) {
      const qg_buffer& b = buffers_[i];
      bool fits = b.bytes >= 0 && b.place >= 0;
      if (b.memory == QG_GIVEN) fits = fits && b.place < pointers_;
      else if (b.memory == QG_ARENA || b.memory == QG_PRIVATE) {
        long all = b.memory == QG_ARENA ? given.arena_bytes : given.private_bytes;
        fits = fits && b.place % kAlign == 0 && b.place <= all && b.bytes <= all - b.place;
      } else {
        fits = b.memory == QG_FIXED && b.bytes >= 0;
      }
      if (!fits) throw Mistake("buffer %ld does not lie in its memory", i);
    }
  }

  void make(const Table& table, long number, const qg_step& given) {
    Step& step = steps_[number];
    step.by_each = given.flags & QG_EACH_THREAD;
    static Maker (*const makers[])(const Table&, long) = {
        make_elementwise, make_matmul, make_attention, make_norm, make_rope, make_softmax,
        make_reduce, make_scan, make_copy, make_take, make_sort, nullptr, make_take_along,
        make_random,      make_scatter,
    };
    static_assert(sizeof(makers) / sizeof(makers[0]) == QG_KINDS);
    if (given.kind < 0 || given.kind >= QG_KINDS) throw Mistake("kind %d is none", given.kind);
    if (given.kind == QG_JUMP) {
      step.jump = *table.args<qg_jump>(given.args);
      if (step.jump.target < 0 || step.jump.target > (long)steps_.size())
        throw Mistake("it jumps to step %ld of %ld", (long)step.jump.target, (long)steps_.size());
      if (qgraph::given(step.jump.if_zero)) {
        table.is_integer("if_zero", step.jump.if_zero);
        table.holds("if_zero", step.jump.if_zero, 1);
      }
      return;
    }
    step.work = makers[given.kind](table, given.args);
    if (step.by_each && step.work->stages() > 1)
      throw Mistake("a step of %d stages cannot be done by each thread", step.work->stages());
  }

  const Step* begun_by(const Step& step, long from, long to) const {
    if (step.work->stages() < 2) return nullptr;
    for (long i = from; i < to; i++) {
      const Step& other = steps_[i];
      if (other.work && !other.begun && step.work->begins_like(*other.work)) return &other;
    }
    return nullptr;
  }

  // Side by side for the steps of a phase; those that begin alike (products of the same rows) have
  // one place.
  void lay_out_scratch() {
    long shared_at = 0, own_at = 0, first = 0;
    for (size_t i = 0; i < steps_.size(); i++) {
      Step& step = steps_[i];
      if (step.leads) shared_at = own_at = 0, first = i;
      if (!step.work) continue;
      step.shared_at = shared_at;
      step.own_at = own_at;
      if (const Step* other = begun_by(step, first, i)) {
        step.begun = true;
        step.shared_at = other->shared_at;
      } else {
        shared_at += up(step.work->shared_bytes(), kAlign);
      }
      own_at += up(step.work->own_bytes(), kAlign);
      if (shared_at > shared_) shared_ = shared_at;
      if (own_at > own_) own_ = own_at;
    }
    own_ += 2 * kAlign;  // no two threads in one line
  }

  long pointers_, arena_ = 0, private_ = 0, own_ = 0, shared_ = 0;
  std::vector<qg_buffer> buffers_;
  std::vector<Step> steps_;
};

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
