// `phases.cuh`, and attention as one of them, by a CPU: what `grid.cuh` asks of a GPU is done here as the PTX ISA says, all blocks at
// the same time.
//
// Copies are made at once or when they are waited for, as `late` says.

#pragma once

#include <cstdint>

#include "attention_on_cpu.hpp"
#include "words_on_cpu.hpp"

inline float rsqrtf(float v) { return 1 / std::sqrt(v); }

namespace qgraph {
namespace phases {

struct Fragment {
  unsigned a[4], b[2];
};
// 16 bytes on their way, or the word that all before have come.
struct Copy {
  char* to;
  const char* from;
  unsigned long long* landing;

  void make() const {
    if (landing)
      ++*landing;
    else
      std::memcpy(to, from, 16);
  }
};
bool late;
std::vector<char*> memories;  // of each block
std::vector<std::vector<std::vector<Copy>>> copies;  // of each thread, in groups
std::vector<Fragment> fragments;
std::vector<int> asked;

inline void prepare(int blocks, int threads, int bytes, bool copy_late) {
  late = copy_late;
  for (char* memory : memories) std::free(memory);
  memories.clear();
  for (int i = 0; i < blocks; i++) {
    memories.push_back(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    std::memset(memories.back(), 0xff, bytes);  // not a number
  }
  copies.assign(blocks * threads, {{}});
  fragments.assign(blocks * threads, {});
  asked.assign(blocks * threads, 0);
}

inline char* block_memory() { return memories[blockIdx.x + gridDim.x * blockIdx.y]; }

inline unsigned add_released(unsigned* to, unsigned number) {
  const unsigned before = *to;
  *to += number;
  return before;
}
inline unsigned load_acquired(const unsigned* from) {
  let_others();
  return *from;
}
inline unsigned add_released_to_all(unsigned* to, unsigned number) { return add_released(to, number); }
inline void store_released_to_all(unsigned* to, unsigned number) { *to = number; }
inline unsigned load_acquired_of_all(const unsigned* from) { return load_acquired(from); }
inline void give_up() { std::abort(); }
inline void push_16(void* to, uint4 v) { std::memcpy(to, &v, 16); }
inline uint4 look_16(const void* from) {
  let_others();
  uint4 v;
  std::memcpy(&v, from, 16);
  return v;
}

inline uint4 load_shared_16(const void* from) {
  if (reinterpret_cast<size_t>(from) % 16) std::abort();
  uint4 v;
  std::memcpy(&v, from, 16);
  return v;
}
template <typename T>
T load_shared(const T* from) {
  return *from;
}

inline void copy_to_block(char* to, const char* from) {
  if ((reinterpret_cast<size_t>(to) | reinterpret_cast<size_t>(from)) % 16) std::abort();
  const Copy copy{to, from, nullptr};
  if (late)
    copies[me].back().push_back(copy);
  else
    copy.make();
}
inline int look_at(const int* number) {
  let_others();
  return *number;
}

// Of each slot how many turns of 32 threads are over; a thread's copies are made when it has asked for
// some time.
using Landing = unsigned long long;
inline void prepare(Landing* landing) { *landing = 0; }
inline void arrive_when_copied(Landing* landing) {
  const Copy arrive{nullptr, nullptr, landing};
  if (!late) return arrive.make();
  copies[me].back().push_back(arrive);
  copies[me].emplace_back();
}
inline bool is_over(Landing* landing, int odd) {
  let_others();
  auto& groups = copies[me];
  if (groups.size() > 1 && ++asked[me] % 3 == 0) {  // the last is still open
    for (const Copy& one : groups.front()) one.make();
    groups.erase(groups.begin());
  }
  return *landing / 32 % 2 != odd;
}

template <typename T>
void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const int lane = me % 32, first = me - lane;
  fragments[me] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  meet(warps[me / 32]);
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const Fragment& left = fragments[first + row % 8 * 4 + k % 8 / 2];
      const Fragment& right = fragments[first + column * 4 + k % 8 / 2];
      c[i] += float(tiled::number<T>(left.a[row / 8 + k / 8 * 2], k % 2)) *
              float(tiled::number<T>(right.b[k / 8], k % 2));
    }
  }
  meet(warps[me / 32]);
}

}  // namespace phases
}  // namespace qgraph
