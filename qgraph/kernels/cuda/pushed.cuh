// Sums over two GPUs, and what follows them: a residual that is added, and an RMS norm.
//
// Each rank writes what it has into the memory of the other.  A word is its own flag: where nothing has
// come yet stands NOTHING, which no number is sent as.  So nobody waits for a fence or is told of
// anything, and the link is busy from the first row to the last.
//
// Who has read a place sets it back to NOTHING.  There are two halves, turn about: a launch that writes
// into a half begins when all of the launch before has come, which the other rank sent after it had
// ended the one before that, and so had set this half back.

namespace qgraph {
namespace phases {

constexpr unsigned NOTHING = ~0u;  // of halves and of float32 a NaN, for which another is sent

struct Inbox {
  static constexpr size_t BYTES = 32 << 20, HEADER = 128;  // as peers.py has it
  static constexpr int COUNT = 0, LAUNCHES = 1;            // words of the header

  unsigned* header;
  char *mine, *theirs;  // this launch's half here, and there

  __device__ explicit Inbox(const uint64_t* places) {
    const int rank = int(places[0]);
    char* here = memory(places, rank);
    header = reinterpret_cast<unsigned*>(here);
    const size_t half = HEADER + load_shared(header + LAUNCHES) % 2 * BYTES;
    mine = here + half;
    theirs = memory(places, 1 - rank) + half;
  }
  static __device__ __forceinline__ char* memory(const uint64_t* places, int of) {
    return reinterpret_cast<char*>(places[2 + of]) + Peers<2>::HEADER + 2 * size_t(places[1]) +
           Table<2>::BYTES;
  }

  __device__ __forceinline__ void push(size_t at, uint4 v) const {
    push_16(theirs + at, {sent(v.x), sent(v.y), sent(v.z), sent(v.w)});
  }
  __device__ __forceinline__ uint4 take(size_t at) const {
    for (long long i = 0;; i++) {
      const uint4 v = look_16(mine + at);
      if (v.x != NOTHING && v.y != NOTHING && v.z != NOTHING && v.w != NOTHING) {
        *reinterpret_cast<uint4*>(mine + at) = {NOTHING, NOTHING, NOTHING, NOTHING};
        return v;
      }
      if (i > Peers<2>::POLLS) give_up();
    }
  }
  // By all threads of a block, when they need none of this any more.
  __device__ void leave() const {
    __syncthreads();
    if (threadIdx.x != 0 || add_released(header + COUNT, 1) != gridDim.x - 1) return;
    header[COUNT] = 0;
    header[LAUNCHES]++;
  }

 private:
  static __device__ __forceinline__ unsigned sent(unsigned v) { return v == NOTHING ? v - 1 : v; }
};

// sum = x here + x there, and h if it ADDS; norm is that of each row of it if it NORMS.  Of `count`
// numbers, in rows of `n`, of which a thread has CHUNKS times 16 bytes.
template <typename T, int CHUNKS, bool ADDS, bool NORMS>
__device__ void push_sum(const uint64_t* places, const T* x, const T* h, const T* weight, T* sum,
                         T* norm, unsigned count, unsigned n, float eps) {
  using Some = Sixteen<T>;
  constexpr int V = Some::COUNT;
  const Inbox inbox(places);
  float* scratch = reinterpret_cast<float*>(block_memory());
  const bool are_aligned =
      ((reinterpret_cast<size_t>(x) | (ADDS ? reinterpret_cast<size_t>(h) : 0) |
        (NORMS ? reinterpret_cast<size_t>(weight) : 0)) % 16) == 0;
  const auto column = [&](int c) { return (c * THREADS + threadIdx.x) * V; };
  const auto is_there = [&](unsigned row, int c) {
    return column(c) < n && row * n + column(c) < count;
  };
  const auto load = [&](const T* from, unsigned row, uint4(&v)[CHUNKS]) {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
      if (is_there(row, c)) v[c] = load_16(from + row * n + column(c), are_aligned);
  };
  const auto push = [&](unsigned row, const uint4(&v)[CHUNKS]) {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
      if (is_there(row, c)) inbox.push((row * n + column(c)) * sizeof(T), v[c]);
  };
  const unsigned rows = (count + n - 1) / n;
  uint4 own[CHUNKS], next[CHUNKS];
  [[maybe_unused]] uint4 residual[CHUNKS];
  if (blockIdx.x < rows) {
    load(x, blockIdx.x, own);
    push(blockIdx.x, own);
  }
  for (unsigned row = blockIdx.x; row < rows; row += gridDim.x) {
    const bool is_last = row + gridDim.x >= rows;
    if (!is_last) load(x, row + gridDim.x, next);
    if constexpr (ADDS) load(h, row, residual);
    if (!is_last) push(row + gridDim.x, next);  // on its way while this one comes
    Some found[CHUNKS];
    float squares[1] = {0};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      if (!is_there(row, c)) continue;
      const size_t i = row * n + column(c);
      const Some one(own[c]), other(inbox.take(i * sizeof(T)));
#pragma unroll
      for (int e = 0; e < V; e++) {
        float v = rounded<T>(one.v[e] + other.v[e]);
        if constexpr (ADDS) v = rounded<T>(Some(residual[c]).v[e] + v);
        found[c].v[e] = v;
        squares[0] += v * v;
      }
      found[c].store(sum + i);
    }
    if constexpr (NORMS) {
      sum_over_block(squares, scratch);
      const float scale = rsqrtf(squares[0] / n + eps);
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        if (!is_there(row, c)) continue;
        const Some w(load_16(weight + column(c), are_aligned));
#pragma unroll
        for (int e = 0; e < V; e++) found[c].v[e] = w.v[e] * rounded<T>(found[c].v[e] * scale);
        found[c].store(norm + row * n + column(c));
      }
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) own[c] = next[c];
  }
  inbox.leave();
}

}  // namespace phases
}  // namespace qgraph
