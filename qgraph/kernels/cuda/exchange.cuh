// Collectives of the GPUs of a mesh, each a launch of its own; `peers.cuh` has those within a region.
//
// A block talks to the blocks of its number on the other GPUs: it lays a piece of what it has where
// they can read it and tells them, and when they have told it, reads theirs.  Reads of far memory are
// many at a time and need no fence, which far writes would.
//
// There is room for two turns: who was told of one turn by another rank knows that it has read the
// turn before, as it does so first.  Launches wait for one another
// (qgraph/runtime/regions/cuda/order.py).

namespace qgraph {
namespace phases {

enum Talk { GATHER, SUM, MAX, MIN, SCATTER };

template <Talk TALK>
__device__ __forceinline__ float both(float a, float b) {
  return TALK == MAX ? greater(a, b) : TALK == MIN ? -greater(-a, -b) : a + b;
}

// Neighbours that are moved at a time.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

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
  static constexpr int BLOCKS = 128, PIECE = 32768, TURN = 15, WORDS = 16;  // as peers.py has it
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
  // Where a rank's block of this number lays what is for another rank.
  __device__ __forceinline__ char* place(int of, int to) const {
    const size_t number = (turn % 2 * BLOCKS + blockIdx.x) * RANKS + to;
    return memory(of) + BLOCKS * WORDS * sizeof(unsigned) + number * PIECE;
  }

  // All others are told that this block's piece is there, and have told it that theirs are.
  __device__ void exchange() const {
    __syncthreads();
    const int other = threadIdx.x;
    if (other < RANKS && other != rank) {
      store_released_to_all(words(other) + rank, turn + 1);
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
__device__ void talk(Table<RANKS>& table, const T* x, T* out, size_t count) {
  using Some = Pack<T, V>;
  constexpr int EACH = Table<RANKS>::PIECE / sizeof(T);
  constexpr int PARTS = TALK == SCATTER ? RANKS : 1;
  constexpr int U = 4, STEP = THREADS * V;  // so many reads are under way
  const int rank = table.rank;
  for (size_t first = blockIdx.x * size_t(EACH); first < count; first += gridDim.x * size_t(EACH)) {
    const int length = count - first < EACH ? count - first : EACH;
#pragma unroll
    for (int to = 0; to < PARTS; to++) {
      if (TALK == SCATTER && to == rank) continue;
      const T* from = x + to * count + first;
      T* place = reinterpret_cast<T*>(table.place(rank, to));
      for (int turn = threadIdx.x * V; turn < length; turn += STEP * U) {
        Some some[U];
#pragma unroll
        for (int u = 0; u < U; u++)
          if (const int i = turn + u * STEP; i < length)
            some[u] = *reinterpret_cast<const Some*>(from + i);
#pragma unroll
        for (int u = 0; u < U; u++)
          if (const int i = turn + u * STEP; i < length)
            *reinterpret_cast<Some*>(place + i) = some[u];
      }
    }
    table.exchange();
    const T* own = x + (TALK == SCATTER ? rank * count : 0) + first;
    for (int turn = threadIdx.x * V; turn < length; turn += STEP * U) {
      [[maybe_unused]] float all[U][V];
#pragma unroll
      for (int of = 0; of < RANKS; of++) {
        const char* place = table.place(of, TALK == SCATTER ? rank : 0);
        const T* from = of == rank ? own : reinterpret_cast<const T*>(place);
        Some some[U];
#pragma unroll
        for (int u = 0; u < U; u++)
          if (const int i = turn + u * STEP; i < length)
            some[u] = take<T, V>(from + i);
#pragma unroll
        for (int u = 0; u < U; u++) {
          const int i = turn + u * STEP;
          if (i >= length) continue;
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
          const int i = turn + u * STEP;
          if (i >= length) continue;
          Some result;
#pragma unroll
          for (int e = 0; e < V; e++) result.v[e] = T(all[u][e]);
          *reinterpret_cast<Some*>(out + first + i) = result;
        }
    }
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
