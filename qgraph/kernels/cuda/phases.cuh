// The parts that a region on CUDA is made of (qgraph/runtime/regions/cuda writes the kernel).
//
// One launch carries out several products, each of them a phase: every block takes all of x into its
// shared memory, computing it there if it is a norm, multiplies some rows of the weight (products.cuh),
// and writes what becomes of them.  Between phases lies a barrier over the grid.  All blocks must be
// resident.

namespace qgraph {
namespace phases {

using namespace tiled;

constexpr int WARPS = 16, THREADS = 32 * WARPS;

// ---- the barrier

// counters[0] counts arrivals, counters[1] departures; both are 0 between launches.
struct Grid {
  unsigned* counters;
  int* open;  // in shared memory: the last goal that was reached
  unsigned goal = 0;

  __device__ void arrive() {
    __syncthreads();
    goal += gridDim.x;
    if (threadIdx.x == 0) add_released(counters, 1);
  }

  // Of several milliseconds a phase takes some; after as many turns as minutes take a block is lost,
  // and an error is better than a machine that hangs.
  template <typename F>
  __device__ void wait(F meanwhile) {
    const bool asks = threadIdx.x < 32;  // the first warp asks, and tells the others
    for (long long turns = 0; ; turns++) {
      const bool here = asks ? threadIdx.x == 0 && int(load_acquired(counters) - goal) >= 0
                             : look_at(open) == int(goal);
      if (__ballot_sync(0xffffffff, here)) break;
      if (asks && turns > (1ll << 28)) give_up();
      meanwhile();
    }
    if (threadIdx.x == 0) *open = goal;
    __syncthreads();
  }

  // The last block to leave sets the counters back: none waits any more.  True in one thread of it.
  __device__ bool leave() {
    if (threadIdx.x != 0 || add_released(counters + 1, 1) != gridDim.x - 1) return false;
    counters[0] = 0, counters[1] = 0;
    return true;
  }
};

// ---- rows

// Eight neighbours, as float32.
struct Eight {
  float v[8];
};

template <typename T>
__device__ __forceinline__ Eight load_8(const T* from) {
  Eight to;
  if constexpr (sizeof(T) == 4) {
    const uint4 a = load_shared_16(from), b = load_shared_16(from + 4);
    const unsigned words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; i++) to.v[i] = __uint_as_float(words[i]);
  } else {
    const uint4 a = load_shared_16(from);
    const unsigned words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int i = 0; i < 8; i++) to.v[i] = number<T>(words[i / 2] >> 16 * (i % 2));
  }
  return to;
}

template <typename T>
__device__ __forceinline__ void store_8(T* to, const Eight& from) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = from.v[i];
  } else {
    const float* v = from.v;
    *reinterpret_cast<uint4*>(to) = {pair<T>(v[0], v[1]), pair<T>(v[2], v[3]), pair<T>(v[4], v[5]),
                                     pair<T>(v[6], v[7])};
  }
}

// NaN if one of them is, as MLX has it.
__device__ __forceinline__ float greater(float a, float b) { return a != a || a > b ? a : b; }

// The sums of all threads' numbers, in all threads; `scratch` holds WARPS numbers of each.
template <int COUNT>
__device__ void sum_over_block(float (&v)[COUNT], float* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int n = 0; n < COUNT; n++) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) v[n] += __shfl_xor_sync(0xffffffff, v[n], step);
    if (lane == 0) scratch[n * WARPS + warp] = v[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < COUNT; n++) {
    v[n] = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) v[n] += scratch[n * WARPS + i];
  }
  __syncthreads();
}

// x in shared memory: of 64 columns each lane's 8 words (the right operand for 4 steps) together.
template <typename T, int K>
struct Rows {
  static constexpr int TILES = (K + 63) / 64, BYTES = TILES * 128 + 16;  // 16 against conflicts
  char* memory;

  // Columns k to k + 7 of row n.
  __device__ __forceinline__ void put(int n, int k, const Eight& x) const {
    unsigned* to = reinterpret_cast<unsigned*>(memory + n * BYTES) + k / 64 * 32 + k % 64 / 8;
#pragma unroll
    for (int t = 0; t < 4; t++) to[t * 8] = pair<T>(x.v[2 * t], x.v[2 * t + 1]);
  }

  // M rows as they lie in memory.
  template <int M>
  __device__ __forceinline__ void copy(const T* from) const {
    for (int i = threadIdx.x; i < M * K / 8; i += THREADS)
      put(i / (K / 8), i % (K / 8) * 8, load_8(from + i * 8));
  }

  // Columns that fill the last tile up are 0.
  template <int M>
  __device__ __forceinline__ void fill() const {
    constexpr int LEFT = TILES * 64 - K;
    if constexpr (LEFT > 0) {
      const Eight zeros = {};
      for (int i = threadIdx.x; i < M * LEFT / 8; i += THREADS)
        put(i / (LEFT / 8), K + i % (LEFT / 8) * 8, zeros);
    }
  }
};

}  // namespace phases
}  // namespace qgraph
