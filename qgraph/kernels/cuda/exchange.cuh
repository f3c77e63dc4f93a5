// Collectives of the GPUs of a mesh, each a launch of its own; `peers.cuh` has those within a region.
//
// A block talks to the blocks of its number on the other GPUs: it lays a piece of what it has where
// they can read it and tells them, and when they have told it, reads theirs.  Reads of far memory are
// many at a time and need no fence, which far writes would.
//
// The piece of the next turn is laid and told of before the others' of this turn are read, so that the
// link need not wait for what happens at home.  There is room for four turns: who was told of turn t - 1
// by another rank, and so may lay t + 1, knows that it has read turn t - 3, as it does so first.
// Launches wait for one another (qgraph/runtime/regions/cuda/order.py).

namespace qgraph {
namespace phases {

enum Talk { GATHER, SUM, MAX, MIN, SCATTER };

template <Talk TALK>
__device__ __forceinline__ float both(float a, float b) {
  return TALK == MAX ? greater(a, b) : TALK == MIN ? -greater(-a, -b) : a + b;
}

// What another block, here or on another GPU, wrote.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> take(const T* from) {
  Pack<T, V> to;
  if constexpr (V == 1) {
    to.v[0] = load_shared(from);
  } else {
    static_assert(sizeof(to) == 16);
    *reinterpret_cast<uint4*>(&to) = load_shared_16(from);
  }
  return to;
}

template <int RANKS>
struct Table {
  static constexpr int BLOCKS = 128, PIECE = 32768, TURNS = 4, TURN = 15, WORDS = 16;  // as peers.py
  static constexpr size_t BYTES = BLOCKS * (WORDS * sizeof(unsigned) + size_t(TURNS) * PIECE);
  static_assert(RANKS <= TURN);

  const uint64_t* places;  // as of `Peers`
  int rank;
  unsigned turn;  // of this block, since the memory was made

  __device__ explicit Table(const uint64_t* places)
      : places(places), rank(int(places[0])), turn(load_shared(words(rank) + TURN)) {}

  __device__ __forceinline__ char* memory(int of) const {
    return reinterpret_cast<char*>(places[2 + of]) + Peers<RANKS>::HEADER + 2 * size_t(places[1]);
  }
  // What the others told this block's number on a rank, and its turn.
  __device__ __forceinline__ unsigned* words(int of) const {
    return reinterpret_cast<unsigned*>(memory(of)) + blockIdx.x * WORDS;
  }
  // Where a rank's block of this number lays its piece of a turn.
  __device__ __forceinline__ char* place(int of, unsigned turn) const {
    const size_t number = turn % TURNS * BLOCKS + blockIdx.x;
    return memory(of) + BLOCKS * WORDS * sizeof(unsigned) + number * PIECE;
  }

  // All others are told that this block's piece of a turn is there.
  __device__ void tell(unsigned turn) const {
    __syncthreads();
    const int other = threadIdx.x;
    if (other < RANKS && other != rank) store_released_to_all(words(other) + rank, turn + 1);
  }
  // All others have told it that theirs of this turn are.
  __device__ void wait() const {
    const int other = threadIdx.x;
    if (other < RANKS && other != rank) {
      const unsigned* told = words(rank) + other;
      for (long long i = 0; int(load_acquired_of_all(told) - turn) <= 0; i++)
        if (i > Peers<RANKS>::POLLS) give_up();
    }
    __syncthreads();
  }
  __device__ void leave() const {
    if (threadIdx.x == 0) words(rank)[TURN] = turn;
  }
};

// `count` numbers are what each rank has, and gets `RANKS` times as much of GATHER, and else as much;
// of SCATTER they are what each gets of `RANKS` times as much.
template <Talk TALK, typename T, int RANKS, int V>
struct Talking {
  using Some = Pack<T, V>;
  static constexpr int PARTS = TALK == SCATTER ? RANKS : 1;  // of a piece, each for another rank
  static constexpr int PART = Table<RANKS>::PIECE / PARTS / 16 * 16, EACH = PART / sizeof(T);
  static constexpr int U = 4, STEP = THREADS * V;  // so many reads are under way

  const Table<RANKS>& table;
  const T* x;
  T* out;
  size_t count;

  __device__ int length(size_t first) const { return count - first < EACH ? count - first : EACH; }

  __device__ void lay(size_t first, unsigned turn) const {
    const int n = length(first);
#pragma unroll
    for (int to = 0; to < PARTS; to++) {
      if (TALK == SCATTER && to == table.rank) continue;
      const T* from = x + to * count + first;
      T* place = reinterpret_cast<T*>(table.place(table.rank, turn) + to * PART);
      for (int start = threadIdx.x * V; start < n; start += STEP * U) {
        Some some[U];
#pragma unroll
        for (int u = 0; u < U; u++)
          if (const int i = start + u * STEP; i < n)
            some[u] = *reinterpret_cast<const Some*>(from + i);
#pragma unroll
        for (int u = 0; u < U; u++)
          if (const int i = start + u * STEP; i < n) *reinterpret_cast<Some*>(place + i) = some[u];
      }
    }
    table.tell(turn);
  }

  __device__ void read(size_t first) const {
    const int n = length(first);
    const T* own = x + (TALK == SCATTER ? table.rank * count : 0) + first;
    for (int start = threadIdx.x * V; start < n; start += STEP * U) {
      [[maybe_unused]] float all[U][V];
#pragma unroll
      for (int of = 0; of < RANKS; of++) {
        const char* place = table.place(of, table.turn) + (TALK == SCATTER ? table.rank * PART : 0);
        const T* from = of == table.rank ? own : reinterpret_cast<const T*>(place);
        Some some[U];
#pragma unroll
        for (int u = 0; u < U; u++)
          if (const int i = start + u * STEP; i < n) some[u] = take<T, V>(from + i);
#pragma unroll
        for (int u = 0; u < U; u++) {
          const int i = start + u * STEP;
          if (i >= n) continue;
          if constexpr (TALK == GATHER)
            *reinterpret_cast<Some*>(out + of * count + first + i) = some[u];
          else
#pragma unroll
            for (int e = 0; e < V; e++)
              all[u][e] = of ? both<TALK>(all[u][e], float(some[u].v[e])) : float(some[u].v[e]);
        }
      }
      if constexpr (TALK != GATHER)
#pragma unroll
        for (int u = 0; u < U; u++) {
          const int i = start + u * STEP;
          if (i >= n) continue;
          Some result;
#pragma unroll
          for (int e = 0; e < V; e++) result.v[e] = T(all[u][e]);
          *reinterpret_cast<Some*>(out + first + i) = result;
        }
    }
  }
};

template <Talk TALK, typename T, int RANKS, int V>
__device__ void talk(Table<RANKS>& table, const T* x, T* out, size_t count) {
  using Way = Talking<TALK, T, RANKS, V>;
  const Way way{table, x, out, count};
  const size_t step = gridDim.x * size_t(Way::EACH);
  size_t first = blockIdx.x * size_t(Way::EACH);
  if (first < count) way.lay(first, table.turn);
  for (; first < count; first += step) {
    if (first + step < count) way.lay(first + step, table.turn + 1);
    table.wait();
    way.read(first);
    table.turn++;
  }
}

// Sixteen bytes at a time where all lies so.
template <Talk TALK, typename T, int RANKS>
__device__ void talk(const uint64_t* places, const T* x, T* out, size_t count) {
  constexpr int V = 16 / sizeof(T);
  Table<RANKS> table(places);
  const size_t low = reinterpret_cast<size_t>(x) | reinterpret_cast<size_t>(out);
  if (low % 16 == 0 && count % V == 0)
    talk<TALK, T, RANKS, V>(table, x, out, count);
  else
    talk<TALK, T, RANKS, 1>(table, x, out, count);
  table.leave();
}

}  // namespace phases
}  // namespace qgraph
