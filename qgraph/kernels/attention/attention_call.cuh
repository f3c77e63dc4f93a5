// What an attention is given: its form, its arrays, and which keys each of its rows sees.

namespace qgraph {

constexpr float LOG2_E = 1.44269504f;  // exp2 is fast
constexpr int FAR = 1 << 30;           // a position that no cache has

// How a number of the caches takes part in products: the type of its parts, and how many.
template <typename S>
struct Parts {
  using Type = S;
  static constexpr int OF_KEYS = 1, OF_WEIGHTS = 2;
};
template <>
struct Parts<float> {
  using Type = __nv_bfloat16;
  static constexpr int OF_KEYS = 3, OF_WEIGHTS = 3;
};

// Eight numbers of a row as they are read: words of two numbers, or of one float32.
template <typename S>
struct alignas(16) Eight {
  unsigned words[2 * sizeof(S)];
};

template <bool ALIGNED, typename S>
__device__ __forceinline__ Eight<S> load(const S* from) {
  if constexpr (ALIGNED) return *reinterpret_cast<const Eight<S>*>(from);
  Eight<S> eight;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if constexpr (sizeof(S) == 4)
      eight.words[i] = __float_as_uint(from[i]);
    else
      eight.words[i / 2] = bits(from[i]) << 16 * (i % 2) | (i % 2 ? eight.words[i / 2] : 0);
  }
  return eight;
}

template <typename P, int COUNT>
__device__ __forceinline__ void split(float low, float high, unsigned (&words)[COUNT]) {
#pragma unroll
  for (int part = 0; part < COUNT; part++) {
    words[part] = pair<P>(low, high);
    low -= float(P(low));
    high -= float(P(high));
  }
}

// Numbers 2 i and 2 i + 1 as a word of each part.
template <typename S>
__device__ __forceinline__ void word(const Eight<S>& eight, int i,
                                     unsigned (&words)[Parts<S>::OF_KEYS]) {
  if constexpr (Parts<S>::OF_KEYS == 1)
    words[0] = eight.words[i];
  else
    split<typename Parts<S>::Type>(__uint_as_float(eight.words[2 * i]),
                                   __uint_as_float(eight.words[2 * i + 1]), words);
}

// c += a b, with what is too small to matter left out.
template <typename P, int A, int B>
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a0)[A],
                                         const unsigned (&a1)[A], const unsigned (&a2)[A],
                                         const unsigned (&a3)[A], const unsigned (&b0)[B],
                                         const unsigned (&b1)[B]) {
#pragma unroll
  for (int i = A - 1; i >= 0; i--) {
#pragma unroll
    for (int j = B - 1; j >= 0; j--)
      if (i + j < (A > B ? A : B)) mma<P>(c, a0[i], a1[i], a2[i], a3[i], b0[j], b1[j]);
  }
}

// What is known when a kernel is compiled.
//   S: of queries, keys and values.   D, DV: numbers of a key and of a value, multiples of 64.
//   TILES: of 8 rows each.   WARPS: of a block.   TAIL: keys that a tail may hold.
//   M: of the mask; void without one, bool (false hides) or a number that is added.
template <typename S_, int D_, int DV_, int TILES_, int WARPS_, int TAIL_ = 0, typename M_ = void>
struct Form {
  using S = S_;
  using M = M_;
  static constexpr int D = D_, DV = DV_, TILES = TILES_, WARPS = WARPS_, TAIL = TAIL_;
  static constexpr int ROWS = 8 * TILES, THREADS = 32 * WARPS;
  static constexpr int NUMBERS = TILES * DV / 4;  // of the result, in each lane
  static constexpr bool ROOMY = WARPS <= 8;  // are there registers for queries and the next keys?
  static constexpr int AT_ONCE = NUMBERS % 32 == 0 && WARPS <= 8 ? 32 : 16;  // that warps exchange
};

// All that tasks share.  Positions that are null: all keys are seen.
template <typename S>
struct Call {
  const S* q;
  int q_batch, q_head, q_query;  // elements from one to the next
  const S *keys, *values;        // (batch, kv_heads, length, D or DV)
  int heads, kv_heads, queries, length, splits;
  float scale;
  const int *last, *first;     // the last query's last key, and the first key, of each batch
  int last_step, first_step;   // 0 where one is for all
  int window;                  // so many keys are seen at most; 0: all
  const void* mask;
  long long mask_batch, mask_head, mask_query, mask_key;
  const S* sinks;  // of each head, a score that takes part in the sum alone
  float* parts;    // of each row and split: result, maximum, sum; unused if there is one split
  S* y;            // (batch, heads, queries, DV)
};

// Keys that are not in the cache (any more): which positions of it they take the place of.
template <typename S>
struct Tail {
  const S *keys, *values;
  int count, low, high;  // how many, and between which positions
  bool dense = false;    // is each position between them one of its?
};

template <class F>
struct Shared {
  alignas(16) typename F::S query[F::ROWS][F::D];
  alignas(16) float exchange[F::WARPS][F::AT_ONCE][32];
  float peak[F::WARPS][F::ROWS], sum[F::WARPS][F::ROWS];
  float weight[F::WARPS][F::ROWS];
  int from[F::ROWS], to[F::ROWS];  // the keys that a row sees
  float scale[F::ROWS];
  int at[F::TAIL + 1];      // positions of the tail; -1: not seen
  float angles[F::D / 2][2];  // cosines and sines, of what is turned
};

// Where a task stands: its part of the keys, its first row among those of the key head.
struct Place {
  int split, row, kv_head, batch;
};

template <class F, typename S>
__device__ Place place_of(const Call<S>& call, int task) {
  const int rows = call.heads / call.kv_heads * call.queries;
  const int tiles = (rows + F::ROWS - 1) / F::ROWS, tile = task / call.splits;
  return {task % call.splits, tile % tiles * F::ROWS, tile / tiles % call.kv_heads,
          tile / tiles / call.kv_heads};
}

// The row of y and of the parts, or -1 beyond the last of the key head.
template <typename S>
__device__ __forceinline__ int row_of(const Call<S>& call, const Place& place, int row) {
  const int sharing = call.heads / call.kv_heads;
  if (place.row + row >= sharing * call.queries) return -1;
  return (place.batch * call.heads + place.kv_head * sharing) * call.queries + place.row + row;
}

// The last query's last key and the first key of a batch.
struct Limits {
  int last, first;
};

template <typename S>
__device__ __forceinline__ Limits limits_of(const Call<S>& call, const Place& place) {
  const int last = call.last ? call.last[place.batch * call.last_step] : call.length - 1;
  const int first = call.first ? call.first[place.batch * call.first_step] : 0;
  return {max(min(last, FAR), -FAR), max(first, 0)};
}

// What each row sees; rows beyond the last see what the first does.  All threads; then a barrier.
template <class F>
__device__ void see(const Call<typename F::S>& call, const Place& place, const Limits& limits,
                    Shared<F>& shared) {
  const int row = threadIdx.x;
  if (row >= F::ROWS) return;
  const int query = row_of(call, place, row) < 0 ? place.row : place.row + row;
  const int end = limits.last + 1 - (call.queries - 1 - query % call.queries);
  const int to = min(end, call.length);
  const int from = call.window ? max(limits.first, end - call.window) : limits.first;
  const bool blind = to <= from;  // all weigh the same then, as under a mask of MLX that hides all
  shared.from[row] = blind ? 0 : from;
  shared.to[row] = blind ? call.length : to;
  shared.scale[row] = blind ? 0 : call.scale * LOG2_E;
}

// 16 keys, rows `base` and on of `keys` and `values`; `at` has the position of each, or they count up.
// Row `fresh` is in none of them yet.
template <typename S>
struct Tile {
  const S *keys, *values;
  int base, count;
  const int* at;
  int fresh = -1;
  const S *fresh_key = nullptr, *fresh_value = nullptr;

  __device__ __forceinline__ int row(int i) const { return min(base + i, count - 1); }
  template <int D>
  __device__ __forceinline__ const S* key(int i) const {
    return row(i) == fresh ? fresh_key : keys + size_t(row(i)) * D;
  }
  template <int D>
  __device__ __forceinline__ const S* value(int i) const {
    return row(i) == fresh ? fresh_value : values + size_t(row(i)) * D;
  }
};

}  // namespace qgraph
