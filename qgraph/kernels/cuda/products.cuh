// Products of a region: what a warp has begun to copy of their weights, and how it multiplies.
//
// A weight lies in tiles (matmul/tiled/layout.py).  Its 16 rows by all columns are a run; PARTS runs that end up
// in the same elements (gate and up) are a unit, and each block has every gridDim.x-th unit.  The pieces of
// all of its runs, one after the other, are dealt out to its warps.
//
// Each warp copies its pieces into a ring in shared memory, as far ahead as that holds, from one product
// into the next: no weight waits for a barrier.  But no more are under way at a time than keep the memory
// busy: whatever the barrier needs, and rows of x, would have to wait for all of them.

namespace qgraph {
namespace phases {

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

// M rows of x by PARTS times WIDTH rows of a weight of K columns.  A piece is PIECE neighbouring tiles of a
// run; ROUND units are added up and finished together.
//
// A multiprocessor does half as many integer operations as others, so what a piece needs for addresses is
// kept small: a place in the order of all pieces is all that is known of the next one.
template <typename T, Mode MODE, int BITS, int GROUP, int M, int K, int WIDTH, int PARTS, int ROUND,
          int PIECE, typename WHICH = OneMatrix>
struct Product {
  static constexpr int TILES = (K + 63) / 64, UNITS = (WIDTH + 15) / 16;
  static constexpr int PIECES = (TILES + PIECE - 1) / PIECE;  // of a run
  static constexpr int ADDENDS = PIECES < WARPS ? PIECES : WARPS;  // of a run's sums
  static constexpr int SCALES = GROUP < 64 ? 64 / GROUP : 1, EACH = 4 / SCALES;  // of a tile's row
  static constexpr int GROUPS = TILES * 64 / GROUP, SCALE = MODE == AFFINE ? 4 : 1;  // bytes
  static constexpr int W_BYTES = 128 * BITS, S_BYTES = 16 * SCALE;  // of 16 rows of a tile, a group
  // Of all scales of a piece each lane copies 16 bytes: COPIES lanes of each group.
  static constexpr int COPIES = S_BYTES / 16, PIECE_GROUPS = GROUP <= 64 ? PIECE * SCALES : PIECE;
  static_assert(PIECE_GROUPS * COPIES <= 32);

  const char *w, *scales;
  WHICH which;
  int all;        // units of this block
  unsigned next;  // the piece that this warp fetches next

  __device__ Product(const void* weight, const void* scales, WHICH which = {})
      : w(static_cast<const char*>(weight)), scales(static_cast<const char*>(scales)), which(which),
        all((UNITS * WHICH::TIMES - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x)),
        next(threadIdx.x / 32) {}

  // The i-th unit of this block: which 16 rows of a matrix, and how often all came before.
  struct Unit {
    unsigned rows, time = 0;
    __device__ __forceinline__ Unit(unsigned i) : rows(blockIdx.x + i * gridDim.x) {
      if constexpr (WHICH::TIMES > 1) time = rows / UNITS, rows %= UNITS;
    }
  };

  // Begins to copy the next piece; false if there is none.
  __device__ __forceinline__ bool fetch(char* slot) {
    const unsigned run = next / PIECES, column = next % PIECES * PIECE, lane = threadIdx.x % 32;
    if (run >= unsigned(all) * PARTS) return false;
    next += WARPS;
    const Unit own(run / PARTS);
    const unsigned rows = own.rows + (WHICH::ADDED ? 0 : run % PARTS * (WIDTH / 16));
    const unsigned group = lane / COPIES;  // of the piece, whose scales this lane copies
    const unsigned tile = column + (GROUP <= 64 ? group / SCALES : group);
    const unsigned first = GROUP <= 64 ? column * SCALES + group : tile * 64 / GROUP;
    const char* from = w + (size_t((rows / 4 * TILES + column) * 4 + rows % 4) * W_BYTES + lane * 16);
    const char* scale =
        scales + (size_t((rows / 4 * GROUPS + first) * 4 + rows % 4) * S_BYTES + lane % COPIES * 16);
    if constexpr (WHICH::ROUTED) {
      constexpr size_t DOWN = (WIDTH * (WHICH::ADDED ? 1 : PARTS) + 63) / 64;  // tiles of a matrix
      const int matrix = which.matrix(own.time, run % PARTS);
      from += matrix * (DOWN * TILES * 4 * W_BYTES), scale += matrix * (DOWN * GROUPS * 4 * S_BYTES);
    }
    char* to = slot + lane * 16;
#pragma unroll
    for (int i = 0; i < PIECE; i++) {
      if (TILES % PIECE != 0 && column + i >= TILES) break;
#pragma unroll
      for (int at = 0; at < W_BYTES; at += 512)
        if (at + 512 <= W_BYTES || at + lane * 16 < W_BYTES)
          copy_to_block(to + i * W_BYTES + at, from + i * 4 * W_BYTES + at);
    }
    if (lane < PIECE_GROUPS * COPIES && (TILES % PIECE == 0 || tile < TILES))
      copy_to_block(to + PIECE * W_BYTES, scale);
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
  __device__ __forceinline__ int row_of_x(unsigned run) const {
    if constexpr (WHICH::ROUTED) return which.row(Unit(run / PARTS).time, run % PARTS);
    const int row = threadIdx.x % 32 / 4;
    return row < M ? row : 0;
  }

  // A piece, whose first tile is `column`.
  __device__ __forceinline__ void multiply(float (&c)[4], const char* piece, unsigned column,
                                           const Rows<T, K>& x, int row) {
    const unsigned lane = threadIdx.x % 32;
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

  // An addend of a run, numbered from the first of the round; of so many pieces each is one, of more what
  // a warp has of them.
  __device__ __forceinline__ void keep(const float (&c)[4], int number, int addend, float* sums) const {
    const int lane = threadIdx.x % 32;
    float* own = sums + (number * ADDENDS + addend) * M * 16 + lane / 4 * 2;
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
    unsigned at = threadIdx.x / 32;  // the piece that is multiplied next
    for (int first = 0; first < all; first += ROUND) {
      const int count = min(ROUND, all - first);
      const Place mine(first, threadIdx.x);
      decltype(read(0, 0)) early = {};
      if (int(threadIdx.x) < count * M * 16 && mine.j < WIDTH) early = read(mine.n, mine.j);
      const unsigned end = (first + count) * PARTS * PIECES;
      float c[4] = {};
      while (at < end) {
        const unsigned run = at / PIECES, piece = at % PIECES;
        ring.fill(fetch);
        ring.wait();
        multiply(c, ring.oldest(), piece * PIECE, x, row_of_x(run));
        ring.used();
        at += WARPS;
        if (PIECES > WARPS && at < (run + 1) * PIECES) continue;
        keep(c, run - first * PARTS, PIECES > WARPS ? threadIdx.x / 32 : piece, sums);
        c[0] = c[1] = c[2] = c[3] = 0;
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
          for (int from = 0; from < ADDENDS; from++)
            y[p] += sums[((unit * PARTS + p) * ADDENDS + from) * M * 16 + i % (M * 16)];
        finish(at.n, at.j, y, i == int(threadIdx.x) ? early : read(at.n, at.j));
      }
      __syncthreads();
    }
  }
};

}  // namespace phases
}  // namespace qgraph
