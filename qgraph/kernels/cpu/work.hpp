// What a step of a region is to the engine: work in tasks, with room to do it in.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <new>

#include "lanes.hpp"
#include "region.h"

namespace qgraph {

// A mistake in a region, said while it is made.
struct Mistake {
  char words[240];

  template <typename... Args>
  explicit Mistake(const char* format, Args... args) {
    std::snprintf(words, sizeof(words), format, args...);
  }
};

// What a task sees: where buffers lie in this run, and its room.
struct Here {
  char* const* buffers;
  char* shared;  // of the step, for all threads, as long as its phase
  char* own;     // of the step and this thread
  int threads;

  char* operator()(const qg_ref& ref) const {
    return ref.buffer < 0 ? nullptr : buffers[ref.buffer] + ref.offset;
  }
  template <typename T>
  T* at(const qg_ref& ref) const {
    return (T*)(*this)(ref);
  }
};

// One step, its arguments checked.  Tasks of a stage run in any order; a stage begins when the one
// before is done.
class Work {
 public:
  virtual ~Work() = default;

  virtual int stages() const { return 1; }
  virtual long tasks(int stage, int threads) const = 0;
  virtual void run(const Here& here, int stage, long task) const = 0;

  // Bytes of scratch that this step wants, of all threads together and of each.
  virtual long shared_bytes() const { return 0; }
  virtual long own_bytes() const { return 0; }

  // Does the first stage of another step leave in shared room what this one's would?
  virtual bool begins_like(const Work&) const { return false; }

  // Done by each thread before its first task of a stage, if `prepares`.
  virtual bool prepares(int) const { return false; }
  virtual void prepare(const Here&, int) const {}
};

using Maker = std::unique_ptr<Work>;

// ---- Checks -----------------------------------------------------------------------------------

// The table of buffers and the arguments, as the makers of work see them.
class Table {
 public:
  explicit Table(const qg_region& region) : region_(region) {}

  template <typename T>
  const T* args(long at, long count = 1) const {
    if (at < 0 || at % 8 || count < 0 || count > region_.args_bytes ||
        at > region_.args_bytes - count * (long)sizeof(T))
      throw Mistake("its arguments at %ld lie outside the %ld bytes", at, (long)region_.args_bytes);
    return (const T*)(region_.args + at);
  }

  // All elements that strides reach from a first one must lie within the buffer.
  void holds(const char* name, const qg_ref& ref, long rank, const int64_t* shape,
             const int64_t* strides) const {
    const qg_buffer& buffer = named(name, ref);
    __int128 low = 0, high = 0;
    for (long i = 0; i < rank; i++) {
      if (shape[i] < 0) throw Mistake("%s has a negative length", name);
      if (shape[i] == 0) return;
      (strides[i] < 0 ? low : high) += (__int128)strides[i] * (shape[i] - 1);
    }
    __int128 size = size_of(ref.dtype), first = ref.offset + low * size;
    __int128 end = ref.offset + (high + 1) * size;
    if (first < 0 || end > buffer.bytes)
      throw Mistake("%s reaches bytes %ld to %ld of buffer %d, which has %ld", name, (long)first,
                    (long)end, ref.buffer, (long)buffer.bytes);
  }

  void holds(const char* name, const qg_ref& ref, long count) const {
    int64_t one = 1, all = count;
    holds(name, ref, 1, &all, &one);
  }

  void one_of(const char* name, const qg_ref& ref, bool fits, const char* wanted) const {
    named(name, ref);
    if (!fits) throw Mistake("%s must be %s", name, wanted);
  }

  void is_float(const char* name, const qg_ref& ref) const {
    one_of(name, ref, qgraph::is_float(ref.dtype), "float32, float16 or bfloat16");
  }

  void is_integer(const char* name, const qg_ref& ref) const {
    one_of(name, ref, !qgraph::is_float(ref.dtype), "an integer");
  }

 private:
  const qg_buffer& named(const char* name, const qg_ref& ref) const {
    if (ref.buffer < 0 || ref.buffer >= region_.buffers)
      throw Mistake("%s names buffer %d of %ld", name, ref.buffer, (long)region_.buffers);
    if (ref.dtype < QG_BOOL || ref.dtype > QG_F32)
      throw Mistake("%s has dtype %d, which is none", name, ref.dtype);
    if (ref.offset % size_of(ref.dtype))
      throw Mistake("%s begins at byte %ld, within an element", name, (long)ref.offset);
    return region_.buffer[ref.buffer];
  }

  const qg_region& region_;
};

inline bool given(const qg_ref& ref) { return ref.buffer >= 0; }

// Parts of at least `least` that share `count` among some tasks for each thread.
inline long part_of(long count, long least, int threads, long each = 4) {
  long parts = threads > 1 ? threads * each : 1;
  long part = (count + parts - 1) / parts;
  return part < least ? least : part;
}

inline long over(long a, long b) { return (a + b - 1) / b; }
inline long up(long a, long b) { return over(a, b) * b; }

// ---- Kinds --------------------------------------------------------------------------------------

Maker make_elementwise(const Table& table, long args);
Maker make_matmul(const Table& table, long args);
Maker make_attention(const Table& table, long args);
Maker make_norm(const Table& table, long args);
Maker make_rope(const Table& table, long args);
Maker make_softmax(const Table& table, long args);
Maker make_reduce(const Table& table, long args);
Maker make_scan(const Table& table, long args);
Maker make_copy(const Table& table, long args);
Maker make_take(const Table& table, long args);
Maker make_sort(const Table& table, long args);
Maker make_random(const Table& table, long args);
Maker make_take_along(const Table& table, long args);
Maker make_scatter(const Table& table, long args);

}  // namespace qgraph
