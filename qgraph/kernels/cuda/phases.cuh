// The parts that a region on CUDA is made of (qgraph/runtime/regions/cuda writes the kernel).
//
// One launch carries out several products, each of them a phase: every block takes all of x into its
// shared memory, computing it there if it is a norm, multiplies some rows of the weight, and writes
// what becomes of them.  Between phases lies a barrier over the grid.  All blocks must be resident.
//
// The weight lies in tiles (matmul/tiled/layout.py).  A unit of work is 16 rows of it, or PARTS times 16 that
// end up in the same elements (gate and up); the warps of a block share its columns.  Each warp copies
// its tiles into a ring in shared memory, as far ahead as that holds, from one product into the next: no
// weight waits for a barrier.  But no more are under way at a time than keep the memory busy: whatever
// the barrier needs, and rows of x, would have to wait for all of them.

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
    if (threadIdx.x < 32) {  // the first warp asks, and tells the others
      for (long long turns = 0; ; turns++) {
        const bool here = threadIdx.x == 0 && int(load_acquired(counters) - goal) >= 0;
        if (__ballot_sync(0xffffffff, here)) break;
        if (turns > (1ll << 28)) give_up();
        meanwhile();
      }
      if (threadIdx.x == 0) *open = goal;
    } else {
      while (look_at(open) != int(goal)) meanwhile();
    }
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

template <typename T>
__device__ __forceinline__ float number(unsigned bits) {
  const unsigned short low = bits;
  return float(*reinterpret_cast<const T*>(&low));
}

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

// A number as it is in T.
template <typename T>
__device__ __forceinline__ float rounded(float v) {
  return float(T(v));
}

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

// The greatest number so far, and its place: the first of several, 0 if no number is one.
struct Greatest {
  float number = -INFINITY;
  int place = 0;

  __device__ __forceinline__ void take(float v, int at) {
    if (v > number || (v == number && at < place)) number = v, place = at;
  }

  // Of all threads of a block, in all of them; `scratch` holds 2 WARPS numbers.
  __device__ void over_block(float* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      take(__shfl_sync(0xffffffff, number, lane ^ step), __shfl_sync(0xffffffff, place, lane ^ step));
    if (lane == 0) scratch[warp] = number, scratch[WARPS + warp] = __int_as_float(place);
    __syncthreads();
    for (int i = 0; i < WARPS; i++) take(scratch[i], __float_as_int(scratch[WARPS + i]));
    __syncthreads();
  }
};

// Puts the place of the greatest of WIDTH numbers to `to`: each block looks at some, and the last to
// have looked knows all.  `parts` holds two numbers of each block; the counter is 0 before and after.
template <int WIDTH, typename T, typename F>
__device__ void pick_greatest(const T* from, float* parts, unsigned* counter, float* scratch, F to) {
  constexpr int EIGHTS = WIDTH / 8;
  Greatest mine;
  for (int i = blockIdx.x + threadIdx.x * gridDim.x; i < EIGHTS; i += THREADS * gridDim.x) {
    const Eight some = load_8(from + i * 8);
#pragma unroll
    for (int e = 0; e < 8; e++) mine.take(some.v[e], i * 8 + e);
  }
  mine.over_block(scratch);
  float* own = parts + 2 * blockIdx.x;
  if (threadIdx.x == 0) {
    own[0] = mine.number, own[1] = __int_as_float(mine.place);
    scratch[0] = add_released(counter, 1) == gridDim.x - 1;
  }
  __syncthreads();
  const bool last = scratch[0] != 0;
  __syncthreads();
  if (!last) return;
  if (threadIdx.x == 0) *counter = 0;
  Greatest all;
  for (int i = threadIdx.x; i < gridDim.x; i += THREADS)
    all.take(load_shared(parts + 2 * i), __float_as_int(load_shared(parts + 2 * i + 1)));
  all.over_block(scratch);
  if (threadIdx.x == 0) to(all.place);
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

// ---- products

// What is read before the sums of an element are there.
template <int COUNT>
struct Few {
  float v[COUNT];
};

// What a warp has begun to copy: up to SLOTS pieces of up to SLOT bytes, in the order of their use, FLIGHT
// of them under way at a time.
template <int SLOT, int SLOTS, int FLIGHT>
struct Ring {
  static constexpr int BYTES = WARPS * SLOTS * (SLOT + int(sizeof(Landing)));
  static_assert(SLOTS > FLIGHT && SLOT % 16 == 0);
  char* memory;
  Landing* landings;  // of each slot
  int next = 0, first = 0, full = 0;  // the slot that is filled next, the first full one, how many are
  int under_way = 0, coming = 0;      // how many of those are not known to be there, and their first
  int odd = 0;                        // of the turn of that one

  __device__ explicit Ring(char* all)
      : memory(all + int(threadIdx.x / 32) * SLOT * SLOTS),
        landings(reinterpret_cast<Landing*>(all + WARPS * SLOT * SLOTS) + threadIdx.x / 32 * SLOTS) {
    if (threadIdx.x % 32 == 0)
      for (int i = 0; i < SLOTS; i++) prepare(landings + i);
    __syncwarp();
  }

  __device__ __forceinline__ char* free() const { return memory + next * SLOT; }
  __device__ __forceinline__ void begun() {
    arrive_when_copied(landings + next);
    next = next + 1 == SLOTS ? 0 : next + 1;
    full++, under_way++;
  }

  // Is the oldest of those under way there?
  __device__ __forceinline__ bool landed() {
    if (__ballot_sync(0xffffffff, is_over(landings + coming, odd)) != 0xffffffff) return false;
    under_way--;
    if (++coming == SLOTS) coming = 0, odd ^= 1;
    return true;
  }

  // Begins to copy by `fetch` what there is room for, until it has nothing.
  template <typename F>
  __device__ __forceinline__ void fill(F fetch) {
    while (under_way > 0 && landed()) {}
    while (under_way < FLIGHT && (full < SLOTS) && fetch()) {}
  }

  __device__ __forceinline__ const char* oldest() const { return memory + first * SLOT; }
  __device__ __forceinline__ void wait() {
    while (full == under_way && !landed()) {}
  }
  __device__ __forceinline__ void used() {
    __syncwarp();
    first = first + 1 == SLOTS ? 0 : first + 1;
    full--;
  }
};

// All rows of x by one matrix.
struct OneMatrix {
  static constexpr bool ROUTED = false, ADDED = false;
  static constexpr int TIMES = 1;  // as often come all units
};

// ROWS rows of x, each by the matrices of its EXPERTS experts, which are known once a router is done: by
// one after the other, or, if their results are ADDED up, in as many parts.  OWN: x has a row of each
// expert.
template <int ROWS, int EXPERTS, bool ADD, bool OWN>
struct ByExpert {
  static constexpr bool ROUTED = true, ADDED = ADD;
  static constexpr int TIMES = ADDED ? ROWS : ROWS * EXPERTS;
  const int* chosen;

  __device__ __forceinline__ int pair(int time, int part) const {
    return ADDED ? time * EXPERTS + part : time;
  }
  __device__ __forceinline__ int matrix(int time, int part) const { return chosen[pair(time, part)]; }
  __device__ __forceinline__ int row(int time, int part) const {
    return OWN ? pair(time, part) : pair(time, part) / EXPERTS;
  }
};

// M rows of x by PARTS times WIDTH rows of a weight of K columns.  Each warp takes every 16th piece of
// PIECE neighbouring tiles; ROUND units are added up and finished together.
//
// A multiprocessor does half as many integer operations as others: what a piece needs for addresses
// and turns was half of the time when a piece was one tile.
template <typename T, Mode MODE, int BITS, int GROUP, int M, int K, int WIDTH, int PARTS, int ROUND,
          int PIECE, typename WHICH = OneMatrix>
struct Product {
  static constexpr int TILES = (K + 63) / 64, UNITS = (WIDTH + 15) / 16;
  static constexpr int TURNS = (TILES + WARPS * PIECE - 1) / (WARPS * PIECE);
  static constexpr int SCALES = GROUP < 64 ? 64 / GROUP : 1, EACH = 4 / SCALES;  // of a tile's row
  static constexpr int GROUPS = TILES * 64 / GROUP, SCALE = MODE == AFFINE ? 4 : 1;  // bytes
  static constexpr int W_BYTES = 128 * BITS, S_BYTES = 16 * SCALE;  // of 16 rows of a tile, a group
  // Of all scales of a piece each lane copies 16 bytes: COPIES lanes of each group.
  static constexpr int COPIES = S_BYTES / 16, PIECE_GROUPS = GROUP <= 64 ? PIECE * SCALES : PIECE;
  static_assert(PIECE_GROUPS * COPIES <= 32);

  const char *w, *scales;
  WHICH which;
  int all;  // units of this block
  // What is fetched next: its unit and part, and from where.
  int unit = 0, part = 0, turn = 0;
  const char *from, *scale;

  __device__ Product(const void* weight, const void* scales, WHICH which = {})
      : w(static_cast<const char*>(weight)), scales(static_cast<const char*>(scales)), which(which),
        all((UNITS * WHICH::TIMES - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x)) {
    if constexpr (!WHICH::ROUTED) seek();
  }

  // The i-th unit of this block: which 16 rows of a matrix, and how often all came before.
  struct Unit {
    int rows, time = 0;
    __device__ __forceinline__ Unit(int i) : rows(int(blockIdx.x) + i * int(gridDim.x)) {
      if constexpr (WHICH::TIMES > 1) time = rows / UNITS, rows %= UNITS;
    }
  };

  // To the first piece of this warp in a unit and part.
  __device__ __forceinline__ void seek() {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * PIECE;
    const Unit own(unit);
    const int rows = own.rows + (WHICH::ADDED ? 0 : part * (WIDTH / 16));
    from = w + ((size_t(rows / 4) * TILES + first) * 4 + rows % 4) * W_BYTES + lane * 16;
    scale = scales + (size_t(rows / 4) * GROUPS * 4 + rows % 4) * S_BYTES + lane % COPIES * 16;
    if constexpr (GROUP <= 64) scale += (first * SCALES + lane / COPIES) * 4 * S_BYTES;
    if constexpr (WHICH::ROUTED) {
      if (unit >= all) return;
      constexpr size_t DOWN = (WIDTH * (WHICH::ADDED ? 1 : PARTS) + 63) / 64;  // tiles of a matrix
      const int matrix = which.matrix(own.time, part);
      from += matrix * (DOWN * TILES * 4 * W_BYTES), scale += matrix * (DOWN * GROUPS * 4 * S_BYTES);
    }
  }

  // Begins to copy the next piece; false if there is none.
  __device__ __forceinline__ bool fetch(char* slot) {
    if (unit >= all) return false;
    const int lane = threadIdx.x % 32;
    const int column = (turn * WARPS + int(threadIdx.x / 32)) * PIECE;
    if (TILES % (WARPS * PIECE) == 0 || column < TILES) {
      char* to = slot + lane * 16;
#pragma unroll
      for (int tile = 0; tile < PIECE; tile++) {
        if (TILES % PIECE != 0 && column + tile >= TILES) break;
#pragma unroll
        for (int i = 0; i < W_BYTES; i += 512)
          if (i + 512 <= W_BYTES || i + lane * 16 < W_BYTES)
            copy_to_block(to + tile * W_BYTES + i, from + tile * 4 * W_BYTES + i);
      }
      const int tile = column + lane / COPIES / SCALES;  // whose scales this lane copies
      const int far = GROUP <= 64 ? 0 : tile * 64 / GROUP * 4 * S_BYTES;
      if (lane < PIECE_GROUPS * COPIES && (TILES % PIECE == 0 || tile < TILES))
        copy_to_block(to + PIECE * W_BYTES, scale + far);
    }
    from += WARPS * PIECE * 4 * W_BYTES;
    if constexpr (GROUP <= 64) scale += WARPS * PIECE * SCALES * 4 * S_BYTES;
    if (++turn == TURNS) {
      turn = 0;
      if (++part == PARTS) part = 0, unit++;
      seek();
    }
    return true;
  }

  template <int STEP>
  __device__ __forceinline__ void step(float (&c)[4], const unsigned (&words)[BITS],
                                       const char* own, Scale& scale, unsigned b0, unsigned b1) {
    if constexpr (STEP % EACH == 0)
      scale = read_scale<T, MODE>(own + STEP / EACH * S_BYTES, threadIdx.x % 32 / 4 * 2);
    unsigned a[4];
    decode<T, MODE, BITS, STEP>(a, words, scale);
    mma<T>(c, a, b0, b1);
  }

  // The row of x that a lane multiplies; columns of the result beyond M are not read.
  __device__ __forceinline__ int row_of_x(int unit, int part) const {
    if constexpr (WHICH::ROUTED) return which.row(Unit(unit).time, part);
    const int row = threadIdx.x % 32 / 4;
    return row < M ? row : 0;
  }

  // A piece, whose first tile is `column`.
  __device__ __forceinline__ void multiply(float (&c)[4], const char* piece, int column,
                                           const Rows<T, K>& x, int row) {
    const int lane = threadIdx.x % 32;
    const char* from = x.memory + row * Rows<T, K>::BYTES + (column * 4 + lane % 4) * 32;
#pragma unroll
    for (int tile = 0; tile < PIECE; tile++) {
      if (TILES % PIECE != 0 && column + tile >= TILES) break;
      const uint4 low = *reinterpret_cast<const uint4*>(from + tile * 128);
      const uint4 high = *reinterpret_cast<const uint4*>(from + tile * 128 + 16);
      unsigned words[BITS];
      read_words<BITS>(words, reinterpret_cast<const unsigned*>(piece + tile * W_BYTES), lane);
      const char* own = piece + PIECE * W_BYTES + tile * SCALES * S_BYTES;
      Scale scale;
      step<0>(c, words, own, scale, low.x, low.y);
      step<1>(c, words, own, scale, low.z, low.w);
      step<2>(c, words, own, scale, high.x, high.y);
      step<3>(c, words, own, scale, high.z, high.w);
    }
  }

  // A warp's sums of a unit and part, numbered from the first of the round.
  __device__ __forceinline__ void keep(const float (&c)[4], int number, float* sums) const {
    const int lane = threadIdx.x % 32;
    float* own = sums + (number * WARPS + int(threadIdx.x / 32)) * M * 16 + lane / 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int n = lane % 4 * 2 + i;
      if (n < M) own[n * 16] = c[i] * Half<T>::unit, own[n * 16 + 1] = c[i + 2] * Half<T>::unit;
    }
  }

  // The row and column of a thread's number, the i-th of those of some units.
  struct Place {
    int n, j;
    __device__ Place(int first, int i) {
      const Unit own(first + i / (M * 16));
      n = i % (M * 16) / 16 + own.time, j = own.rows * 16 + i % 16;
    }
  };

  // All of the product, once x is there; finish(n, j, y, read(n, j)) gets the PARTS numbers of row n
  // that are columns j, j + WIDTH, ...  Each slot that becomes free is filled again by `fetch`.
  template <typename Q, typename N, typename R, typename F>
  __device__ __forceinline__ void run(const Rows<T, K>& x, float* sums, Q& ring, N fetch, R read,
                                      F finish) {
    const int warp = threadIdx.x / 32;
    for (int first = 0; first < all; first += ROUND) {
      const int count = min(ROUND, all - first);
      const Place mine(first, threadIdx.x);
      decltype(read(0, 0)) early = {};
      if (int(threadIdx.x) < count * M * 16 && mine.j < WIDTH) early = read(mine.n, mine.j);
      for (int number = 0; number < count * PARTS; number++) {
        float c[4] = {};
        const int row = row_of_x(first + number / PARTS, number % PARTS);
        for (int turn = 0; turn < TURNS; turn++) {
          ring.fill(fetch);
          ring.wait();
          const int column = (turn * WARPS + warp) * PIECE;
          if (column < TILES) multiply(c, ring.oldest(), column, x, row);
          ring.used();
        }
        keep(c, number, sums);
      }
      __syncthreads();
      for (int i = threadIdx.x; i < count * M * 16; i += THREADS) {
        const Place at(first, i);
        if (at.j >= WIDTH) continue;
        const int unit = i / (M * 16);
        float y[PARTS] = {};
#pragma unroll
        for (int p = 0; p < PARTS; p++)
#pragma unroll
          for (int from = 0; from < WARPS; from++)
            y[p] += sums[((unit * PARTS + p) * WARPS + from) * M * 16 + i % (M * 16)];
        finish(at.n, at.j, y, i == int(threadIdx.x) ? early : read(at.n, at.j));
      }
      __syncthreads();
    }
  }
};

}  // namespace phases
}  // namespace qgraph
