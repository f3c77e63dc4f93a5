// Sums over the GPUs of a mesh, within a kernel that all of them run (`phases.cuh`).
//
// Each rank has memory that all can reach (qgraph/runtime/regions/cuda/peers.py lays it out).  What a
// rank adds to a sum it writes into its own place in the memory of every rank, and tells them; who
// reads the sum adds up what is in its own memory, in the order of ranks, so all find the same.
//
// No place is written while it may still be read: a launch takes the other half of the memory than
// the one before, and who has come to the barrier of a launch has ended the one before.

namespace qgraph {
namespace phases {

template <int RANKS>
struct Peers {
  static constexpr int COUNT = 0, BEFORE = 16, LAUNCHES = 17, TOLD = 64, APART = 16;  // words
  static constexpr int HEADER = 4096;  // bytes
  static constexpr long long POLLS = 1ll << 32;  // half an hour or more

  // places[0] is this rank, places[1] the bytes of a half, then comes each rank's memory.
  const uint64_t* places;
  int rank;
  unsigned turn;  // barriers so far, since the memory was made
  char* half;     // the half of this launch, in this rank's memory

  __device__ explicit Peers(const uint64_t* places)
      : places(places), rank(int(places[0])), turn(load_shared(header(rank) + BEFORE)) {
    const unsigned launches = load_shared(header(rank) + LAUNCHES);
    half = memory(rank) + HEADER + launches % 2 * size_t(places[1]);
  }

  __device__ __forceinline__ char* memory(int of) const {
    return reinterpret_cast<char*>(places[2 + of]);
  }
  __device__ __forceinline__ unsigned* header(int of) const {
    return reinterpret_cast<unsigned*>(memory(of));
  }

  // What this rank adds to number `i` of a sum, whose places begin at `at` and have `bytes` each.
  template <typename T>
  __device__ __forceinline__ void put(int at, int bytes, int i, T v) const {
    const size_t far = half - memory(rank) + at + size_t(rank) * bytes + i * sizeof(T);
#pragma unroll
    for (int to = 0; to < RANKS; to++) *reinterpret_cast<T*>(memory(to) + far) = v;
  }

  template <typename T>
  __device__ __forceinline__ Eight sum_8(int at, int bytes, int i) const {
    const char* from = half + at + i * sizeof(T);
    Eight sum = load_8(reinterpret_cast<const T*>(from));
#pragma unroll
    for (int of = 1; of < RANKS; of++) {
      const Eight one = load_8(reinterpret_cast<const T*>(from + size_t(of) * bytes));
#pragma unroll
      for (int e = 0; e < 8; e++) sum.v[e] += one.v[e];
    }
#pragma unroll
    for (int e = 0; e < 8; e++) sum.v[e] = rounded<T>(sum.v[e]);
    return sum;
  }

  template <typename T>
  __device__ __forceinline__ float sum(int at, int bytes, int i) const {
    float all = 0;
#pragma unroll
    for (int of = 0; of < RANKS; of++)
      all += float(load_shared(reinterpret_cast<const T*>(half + at + size_t(of) * bytes) + i));
    return rounded<T>(all);
  }

  // A barrier over the grids of all ranks.  The last block of a rank to arrive tells the others.
  __device__ void arrive() {
    __syncthreads();
    turn++;
    if (threadIdx.x != 0) return;
    unsigned* count = header(rank) + COUNT;
    if (add_released_to_all(count, 1) != gridDim.x - 1) return;
    *count = 0;  // nobody arrives again before all were told
    for (int to = 0; to < RANKS; to++)
      store_released_to_all(header(to) + TOLD + rank * APART, turn);
  }

  // Whether all have arrived before so many looks.
  __device__ bool met(long long polls) const {
    bool here = true;
    if (threadIdx.x < RANKS) {
      const unsigned* told = header(rank) + TOLD + threadIdx.x * APART;
      for (long long i = 0; int(load_acquired_of_all(told) - turn) < 0 && here; i++)
        here = i < polls;
    }
    __syncthreads();
    return here;
  }

  // Others may still be starting; who is lost is noticed outside (qgraph/runtime/mesh.py).
  __device__ void wait() const {
    if (!met(POLLS)) give_up();
  }

  // By one thread, when no block needs any of this any more.
  __device__ void leave() const {
    header(rank)[BEFORE] = turn;
    header(rank)[LAUNCHES]++;
  }
};

}  // namespace phases
}  // namespace qgraph
