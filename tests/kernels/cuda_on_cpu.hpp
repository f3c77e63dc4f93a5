// Runs CUDA source on a CPU, block after block or some together, their threads as fibers that take
// turns: enough of CUDA for the sources in `qgraph/kernels`, to test them where there is no GPU.

#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

template <typename T>
const T& max(const T& a, const T& b) {
  return a < b ? b : a;
}
template <typename T>
const T& min(const T& a, const T& b) {
  return b < a ? b : a;
}

struct Index {
  int x, y, z;
} threadIdx, blockIdx, blockDim, gridDim;

// Fibers that wait for one another: all that meet here go on together.
struct Meeting {
  int expected = 0, arrived = 0;
  long number = 0;
};

struct Fiber {
  void* place[5];  // where it goes on
  bool begun = false, done = false;
  const Meeting* waits = nullptr;  // for the end of that, while its number is
  long number;
};
constexpr size_t STACK = (1 << 16) + 17 * 64;  // no multiple of what a cache's lines are found by

std::vector<Fiber> fibers;
void* scheduler[5];
std::vector<Meeting> blocks, warps;
std::vector<float> exchanged;
std::vector<char*> stacks;  // of those that were ever needed
void (*kernel)();

int me;  // the number of the fiber that has its turn
int slowness = 4;  // a slow block has one turn for so many of the others

// Goes on at a place.  (`swapcontext` would ask the system about signals each time.)
__attribute__((noipa)) void jump(void** place) { __builtin_longjmp(place, 1); }

// Lets the others have their turns.
__attribute__((noipa)) void let_others() {
  if (!__builtin_setjmp(fibers[me].place)) jump(scheduler);
}

inline void run_kernel() {
  kernel();
  fibers[me].done = true;
  jump(scheduler);
}

// Lets a fiber go on until it lets others.
__attribute__((noipa)) void go_on(Fiber& fiber) {
  if (__builtin_setjmp(scheduler)) return;
  if (fiber.begun) jump(fiber.place);
  fiber.begun = true;
  static ucontext_t start;
  getcontext(&start);
  start.uc_stack = {stacks[me], 0, STACK};
  makecontext(&start, run_kernel, 0);
  setcontext(&start);
}

inline void meet(Meeting& meeting) {
  Fiber& fiber = fibers[me];
  fiber.number = meeting.number;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0, meeting.number++;
    return;
  }
  fiber.waits = &meeting;
  let_others();
  fiber.waits = nullptr;
}

inline void __syncthreads() { meet(blocks[me / blockDim.x]); }
inline void __syncwarp() { meet(warps[me / 32]); }

// What another lane gives, of four bytes.
template <typename T>
T of_lane(T value, int lane) {
  std::memcpy(&exchanged[me], &value, sizeof(T));
  meet(warps[me / 32]);
  T other;
  std::memcpy(&other, &exchanged[me / 32 * 32 + lane], sizeof(T));
  meet(warps[me / 32]);
  return other;
}

// How many threads of the block say yes.
inline int __syncthreads_count(bool yes) {
  static std::vector<int> counts;
  if (counts.size() < blocks.size()) counts.resize(blocks.size());
  int& count = counts[me / blockDim.x];
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  count += yes;
  __syncthreads();
  const int all = count;
  __syncthreads();
  return all;
}

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return of_lane(value, threadIdx.x % 32 ^ mask);
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return of_lane(value, lane);
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int by) {
  const int lane = threadIdx.x % 32;
  return of_lane(value, lane < by ? lane : lane - by);
}

inline unsigned __ballot_sync(unsigned, bool value) {
  exchanged[me] = value;
  meet(warps[me / 32]);
  unsigned all = 0;
  for (int lane = 0; lane < 32; lane++) all |= unsigned(exchanged[me / 32 * 32 + lane] != 0) << lane;
  meet(warps[me / 32]);
  return all;
}

inline int atomicAdd(int* to, int what) {  // fibers take turns only where they meet
  const int before = *to;
  *to += what;
  return before;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(bits); }

inline int __float_as_int(float number) {
  int bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}

inline float __int_as_float(int bits) {
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

inline Index block_of(int number, Index grid) {
  return {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
}

// False if threads wait for others that never come.  `together` blocks are resident at a time; their
// threads take turns in order, or from the last to the first; those of the last block are slow.
inline bool launch(void (*what)(), Index grid, int threads, int together = 1,
                   bool backwards = false) {
  kernel = what;
  gridDim = grid, blockDim = {threads, 1, 1};
  const int slow = backwards ? 0 : together - 1;
  for (int first = 0; first < grid.x * grid.y * grid.z; first += together) {
    const int count = threads * together;
    fibers.assign(count, {});
    while (stacks.size() < fibers.size()) stacks.push_back(new char[STACK]);
    blocks.assign(together, {threads});
    warps.assign(count / 32, {32});
    exchanged.assign(count, 0);
    int left = count;
    for (long turns = 0; left > 0; turns++) {
      if (turns > (together > 1 ? 12000 : 1000000)) return false;
      left = 0;
      bool any = false;  // does one of them not wait for others?
      for (int i = 0; i < count; i++) {
        me = backwards ? count - 1 - i : i;
        Fiber& fiber = fibers[me];
        if (fiber.done) continue;
        left++;
        if (fiber.waits && fiber.waits->number == fiber.number) continue;
        any = true;
        if (together > 1 && me / threads == slow && turns % slowness) continue;  // others wait
        threadIdx.x = me % threads, blockIdx = block_of(first + me / threads, grid);
        go_on(fiber);
        left -= fiber.done;
      }
      if (left && !any) return false;
    }
  }
  return true;
}

inline bool launch(void (*what)(), int blocks, int threads) {
  return launch(what, Index{blocks, 1, 1}, threads);
}
