// Memory that runs of regions lend one another.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#include "work.hpp"

namespace qgraph {

constexpr long kAlign = 64;

inline char* aligned_memory(size_t bytes) {
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

inline Rooms& rooms() {
  static Rooms* all = new Rooms;  // never freed: threads may outlive what ends with the process
  return *all;
}

}  // namespace qgraph
