// A region made ready: its steps checked and turned into work, its memory laid out.
#pragma once

#include <vector>

#include "rooms.hpp"

namespace qgraph {

struct Step {
  Maker work;  // none: a jump
  qg_jump jump{};
  bool leads = true;  // begins a phase
  bool by_each = false;
  bool begun = false;  // another step of the phase does its first stage
  long shared_at = 0, own_at = 0;  // of its scratch
};

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

  void run(void* const* pointers, int threads, int64_t* nanoseconds);  // region.cpp

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

}  // namespace qgraph
