// softmax(scale q k^T + mask) v for few queries, over keys of a cache, split over the whole GPU.
//
// A task is a part of the keys of one key head, read once for up to ROWS of the queries that share
// it.  Keys and values go from memory straight into the registers of the tensor cores' fragments:
// which number of a key stands where in a sum is free, so each lane reads 16 bytes of a row and takes
// them for whatever numbers its fragment wants.  S^T = K Q^T gives for each query its scores; as P^T
// they are the other operand of O^T = V^T P^T.  Each warp keeps maximum, sum and result of its keys
// (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018), the block joins its
// warps, and `join` the tasks (Dao et al., "Flash-Decoding for long-context inference", 2023).
//
// The weights P are the sum of two 16-bit numbers, and all that is float32 the sum of three of bfloat16,
// so that nothing is rounded that MLX would not round.

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

// One warp's share: scores and results of its keys so far, as fragments.  ALIGNED: all rows of keys and
// values begin where 16 bytes can be read.
template <class F, bool ALIGNED>
struct Warp {
  using S = typename F::S;
  using P = typename Parts<S>::Type;
  static constexpr int KEY_CHUNKS = F::D / 32, VALUE_CHUNKS = F::DV / 64;
  static constexpr int K = Parts<S>::OF_KEYS, W = Parts<S>::OF_WEIGHTS;

  const Call<S>& call;
  const Place& place;
  const Shared<F>& shared;
  const Tail<S>& tail;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  Eight<S> query[F::ROOMY ? F::TILES : 1][KEY_CHUNKS];
  float peak[F::TILES][2], sum[F::TILES][2];
  float result[F::TILES][VALUE_CHUNKS][4][4];
  int low, high, inner_low, inner_high;  // keys that some row sees, and that all do

  __device__ Warp(const Call<S>& call, const Place& place, const Shared<F>& shared,
                  const Tail<S>& tail)
      : call(call), place(place), shared(shared), tail(tail) {
    low = inner_low = shared.from[0], high = inner_high = shared.to[0];
    for (int row = 1; row < F::ROWS; row++) {
      low = min(low, shared.from[row]), inner_low = max(inner_low, shared.from[row]);
      high = max(high, shared.to[row]), inner_high = min(inner_high, shared.to[row]);
    }
    begin();
  }

  // All rows see the same keys.
  __device__ Warp(const Call<S>& call, const Place& place, const Shared<F>& shared,
                  const Tail<S>& tail, int low, int high)
      : call(call), place(place), shared(shared), tail(tail), low(low), high(high), inner_low(low),
        inner_high(high) {
    begin();
  }

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int n = 0; n < F::TILES; n++) {
#pragma unroll
      for (int c = 0; c < KEY_CHUNKS; c++)
        if (F::ROOMY) query[n][c] = own_query(n, c);
#pragma unroll
      for (int i = 0; i < 2; i++) peak[n][i] = -INFINITY, sum[n][i] = 0;
#pragma unroll
      for (int i = 0; i < VALUE_CHUNKS * 16; i++) (&result[n][0][0][0])[i] = 0;
    }
  }

  __device__ __forceinline__ Eight<S> own_query(int n, int c) const {
    return load<true>(&shared.query[8 * n + g][32 * c + 8 * t]);
  }

  static __device__ __forceinline__ void read(const Tile<S>& tile,
                                              Eight<S> (&keys)[2][KEY_CHUNKS]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const S* row = tile.template key<F::D>(8 * half + g) + 8 * t;
#pragma unroll
      for (int c = 0; c < KEY_CHUNKS; c++) keys[half][c] = load<ALIGNED>(row + 32 * c);
    }
  }

  // The keys of a lane's values are 2 t, 2 t + 1, 2 t + 8, 2 t + 9.
  static __device__ __forceinline__ int value_key(int i, int t) { return 2 * t + i % 2 + i / 2 * 8; }

  static __device__ __forceinline__ void read_values(const Tile<S>& tile,
                                                     Eight<S> (&values)[4][VALUE_CHUNKS]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const S* row = tile.template value<F::DV>(value_key(i, t)) + 8 * g;
#pragma unroll
      for (int c = 0; c < VALUE_CHUNKS; c++) values[i][c] = load<ALIGNED>(row + 64 * c);
    }
  }

  // The position of a key of a tile, or -1 where it is none that any row sees.
  __device__ int position(const Tile<S>& tile, int i) const {
    if (tile.base + i >= tile.count) return -1;
    int at = tile.base + i;
    if (tile.at) {
      at = tile.at[at];
    } else if (F::TAIL && at >= tail.low && at <= tail.high) {
      if (tail.dense) return -1;
      for (int j = 0; j < tail.count; j++)
        if (shared.at[j] == at) return -1;
    }
    return at >= low && at < high ? at : -1;
  }

  __device__ __forceinline__ bool all_seen(const Tile<S>& tile) const {
    if (tile.at || !SAME<typename F::M, void>) return false;
    if (F::TAIL && tile.base <= tail.high && tile.base + 16 > tail.low) return false;
    return tile.base >= inner_low && tile.base + 16 <= min(inner_high, tile.count);
  }

  // A score with the mask on it; -infinity where the row does not see the key.
  __device__ float masked(float score, int row, int at) const {
    if (at < shared.from[row] || at >= shared.to[row]) return -INFINITY;
    using M = typename F::M;
    if constexpr (!SAME<M, void>) {
      const int whole = place.row + row, sharing = call.heads / call.kv_heads;
      if (whole >= sharing * call.queries) return score;
      const size_t i = place.batch * call.mask_batch +
                       (place.kv_head * sharing + whole / call.queries) * call.mask_head +
                       whole % call.queries * call.mask_query + at * call.mask_key;
      const M mask = static_cast<const M*>(call.mask)[i];
      if constexpr (SAME<M, bool>)
        return mask ? score : -1e38f;  // as MLX: where all are hidden, all weigh the same
      else
        return score + float(mask) * LOG2_E;
    }
    return score;
  }

  __device__ __forceinline__ void score(const Eight<S> (&keys)[2][KEY_CHUNKS],
                                        float (&scores)[F::TILES][4]) const {
#pragma unroll
    for (int n = 0; n < F::TILES; n++) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0;
#pragma unroll
    for (int c = 0; c < KEY_CHUNKS; c++) {
      Eight<S> own[F::TILES];
#pragma unroll
      for (int n = 0; n < F::TILES; n++) own[n] = F::ROOMY ? query[n][c] : own_query(n, c);
#pragma unroll
      for (int step = 0; step < 4; step += 2) {
        unsigned a0[K], a1[K], a2[K], a3[K];
        word(keys[0][c], step, a0), word(keys[1][c], step, a1);
        word(keys[0][c], step + 1, a2), word(keys[1][c], step + 1, a3);
#pragma unroll
        for (int n = 0; n < F::TILES; n++) {
          unsigned b0[K], b1[K];
          word(own[n], step, b0), word(own[n], step + 1, b1);
          multiply<P>(scores[n], a0, a1, a2, a3, b0, b1);
        }
      }
    }
  }

  // Scores become weights.
  __device__ __forceinline__ void weigh(const Tile<S>& tile, float (&scores)[F::TILES][4]) {
    const bool all = all_seen(tile);
    const int at[2] = {all ? 0 : position(tile, g), all ? 0 : position(tile, g + 8)};
#pragma unroll
    for (int n = 0; n < F::TILES; n++) {
      float keep[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int row = 8 * n + 2 * t + i;
        float &upper = scores[n][i], &lower = scores[n][i + 2];
        upper *= shared.scale[row], lower *= shared.scale[row];
        if (!all) upper = masked(upper, row, at[0]), lower = masked(lower, row, at[1]);
        float now = fmaxf(upper, lower);
#pragma unroll
        for (int step = 4; step < 32; step *= 2)
          now = fmaxf(now, __shfl_xor_sync(0xffffffff, now, step));
        now = fmaxf(now, peak[n][i]);
        const float zero = now == -INFINITY ? 0 : now;
        keep[i] = exp2f(peak[n][i] - zero);
        peak[n][i] = now;
        upper = exp2f(upper - zero), lower = exp2f(lower - zero);
        sum[n][i] = sum[n][i] * keep[i] + upper + lower;
      }
      if (__ballot_sync(0xffffffff, keep[0] != 1 || keep[1] != 1) == 0) continue;
#pragma unroll
      for (int i = 0; i < VALUE_CHUNKS * 16; i++) (&result[n][0][0][0])[i] *= keep[i % 2];
    }
  }

  __device__ __forceinline__ void add(const Tile<S>& tile, const float (&weights)[F::TILES][4],
                                      Eight<S> (&values)[4][VALUE_CHUNKS]) {
    if (!all_seen(tile)) {  // nothing times infinity is no number
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (position(tile, value_key(i, t)) >= 0) continue;
#pragma unroll
        for (int c = 0; c < VALUE_CHUNKS; c++) values[i][c] = {};
      }
    }
    unsigned b0[F::TILES][W], b1[F::TILES][W];
#pragma unroll
    for (int n = 0; n < F::TILES; n++) {
      split<P>(weights[n][0], weights[n][1], b0[n]);
      split<P>(weights[n][2], weights[n][3], b1[n]);
#pragma unroll
      for (int part = 0; part < W; part++)
        b0[n][part] = transposed(b0[n][part]), b1[n][part] = transposed(b1[n][part]);
    }
#pragma unroll
    for (int c = 0; c < VALUE_CHUNKS; c++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        unsigned w[4][K], a0[K], a1[K], a2[K], a3[K];
#pragma unroll
        for (int i = 0; i < 4; i++) word(values[i][c], j, w[i]);
#pragma unroll
        for (int part = 0; part < K; part++) {
          a0[part] = lower(w[0][part], w[1][part]), a1[part] = upper(w[0][part], w[1][part]);
          a2[part] = lower(w[2][part], w[3][part]), a3[part] = upper(w[2][part], w[3][part]);
        }
#pragma unroll
        for (int n = 0; n < F::TILES; n++)
          multiply<P>(result[n][c][j], a0, a1, a2, a3, b0[n], b1[n]);
      }
    }
  }

  // So many tiles of the cache, every WARPS-th from `cache` on, and so many of the tail; while one is
  // worked on the next is read, if ROOMY.  In one loop: code that runs once is waited for.
  __device__ void attend(const Tile<S>& cache, int of_cache, const Tile<S>& rest, int of_rest) {
    if (of_cache + of_rest <= 0) return;
    const auto tile_at = [&](int i) {
      Tile<S> tile = i < of_cache ? cache : rest;
      tile.base += 16 * F::WARPS * (i < of_cache ? i : i - of_cache);
      return tile;
    };
    Eight<S> keys[2][KEY_CHUNKS];
    if (F::ROOMY) read(tile_at(0), keys);
    for (int i = 0; i < of_cache + of_rest; i++) {
      const Tile<S> tile = tile_at(i);
      Eight<S> values[4][VALUE_CHUNKS];
      float scores[F::TILES][4];
      if (!F::ROOMY) read(tile, keys);
      read_values(tile, values);
      score(keys, scores);
      if (F::ROOMY && i + 1 < of_cache + of_rest) read(tile_at(i + 1), keys);
      weigh(tile, scores);
      add(tile, scores, values);
    }
  }
};

// A row's sum with its sink, and the maximum of both; the factor that what was summed shrinks by.
template <typename S>
__device__ float with_sink(const Call<S>& call, int row, float& peak, float& sum) {
  if (!call.sinks) return 1;
  const float sink = float(call.sinks[row / call.queries % call.heads]) * LOG2_E;
  const float top = fmaxf(peak, sink), shrink = exp2f(peak - top);
  sum = sum * shrink + exp2f(sink - top);
  peak = top;
  return shrink;
}

// What the results of each warp are multiplied by, once their maxima and sums are there.
template <class F>
__device__ void weigh_warps(const Call<typename F::S>& call, const Place& place, Shared<F>& shared) {
  // Neighbouring lanes have the warps of a row.
  static_assert(F::ROWS * F::WARPS <= F::THREADS && 32 % F::WARPS == 0);
  constexpr int COUNT = F::ROWS * F::WARPS;
  if (threadIdx.x >= (COUNT + 31) / 32 * 32) return;
  const int row = threadIdx.x / F::WARPS % F::ROWS, w = threadIdx.x % F::WARPS;
  const int whole = row_of(call, place, row);
  const float own = shared.peak[w][row];
  float peak = own;
#pragma unroll
  for (int step = 1; step < F::WARPS; step *= 2)
    peak = fmaxf(peak, __shfl_xor_sync(0xffffffff, peak, step));
  float weight = peak == -INFINITY ? 0 : exp2f(own - peak), sum = weight * shared.sum[w][row];
#pragma unroll
  for (int step = 1; step < F::WARPS; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  if (call.splits == 1) {
    weight *= whole < 0 ? 0 : with_sink(call, whole, peak, sum) / sum;
  } else if (whole >= 0 && w == 0) {
    float* part = call.parts + (size_t(whole) * call.splits + place.split) * (F::DV + 2);
    part[F::DV] = peak, part[F::DV + 1] = sum;
  }
  shared.weight[w][row] = weight;
}

// The results of the first `active` warps become one, of each row.  Of eight rows the first USED are
// there: lanes that have others do not exchange them.
template <class F, int USED = 8, class W>
__device__ void finish(const Call<typename F::S>& call, const Place& place, W& mine, int active,
                       Shared<F>& shared) {
  using S = typename F::S;
  constexpr int T = USED > 4 ? 4 : USED > 2 ? 2 : 1, LANES = 8 * T;
  constexpr int FIT = F::AT_ONCE * (4 / T), AT_ONCE = F::NUMBERS % FIT ? F::AT_ONCE : FIT;
  const int warp = threadIdx.x / 32;
  const auto exchange = [&](int w) { return &shared.exchange[w][0][0]; };
#pragma unroll
  for (int n = 0; n < F::TILES; n++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float sum = mine.sum[n][i];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
      const int row = 8 * n + 2 * mine.t + i;
      if (mine.g == 0) shared.peak[warp][row] = mine.peak[n][i], shared.sum[warp][row] = sum;
    }
  }
#pragma unroll
  for (int start = 0; start < F::NUMBERS; start += AT_ONCE) {
    if (start > 0) __syncthreads();
    if (mine.t < T) {
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++)
        exchange(warp)[i * LANES + mine.g * T + mine.t] = (&mine.result[0][0][0][0])[start + i];
    }
    __syncthreads();
    if (start == 0) {
      weigh_warps<F>(call, place, shared);
      __syncthreads();
    }
    for (int at = threadIdx.x; at < AT_ONCE * LANES; at += F::THREADS) {
      const int number = start + at / LANES, g = at % LANES / T, t = at % T;
      const int n = number / (F::DV / 4), c = number / 16 % (F::DV / 64), j = number / 4 % 4;
      const int row = 8 * n + 2 * t + number % 2;
      const int column = 64 * c + 8 * g + 2 * j + number / 2 % 2;
      const int whole = row_of(call, place, row);
      if (whole < 0) continue;
      float total = 0;
#pragma unroll 8
      for (int w = 0; w < active; w++) total += shared.weight[w][row] * exchange(w)[at];
      if (call.splits == 1)
        call.y[size_t(whole) * F::DV + column] = S(total);
      else
        call.parts[(size_t(whole) * call.splits + place.split) * (F::DV + 2) + column] = total;
    }
  }
}

// A task of one key head's keys and values; see `attend`.
template <class F, bool ALIGNED>
__device__ void attend_to(const typename F::S* keys, const typename F::S* values,
                          const Call<typename F::S>& call, const Place& place,
                          const Tail<typename F::S>& tail, Shared<F>& shared) {
  using S = typename F::S;
  Warp<F, ALIGNED> mine(call, place, shared, tail);
  // How many of `count` are every WARPS-th from `first` on.
  const auto own = [](int count, int first) { return max(count - first + F::WARPS - 1, 0) / F::WARPS; };
  const int start = mine.low / 16, tiles = (mine.high + 15) / 16 - start;
  const int share = (tiles + call.splits - 1) / call.splits, warp = threadIdx.x / 32;
  const int from = place.split * share, last = F::WARPS - 1 - warp;
  const Tile<S> cache{keys, values, (start + from + warp) * 16, call.length, nullptr};
  const Tile<S> rest{tail.keys, tail.values, last * 16, tail.count, shared.at};
  // The tail is for the last warps, which have the fewest keys.
  const bool has_tail = F::TAIL && place.split == call.splits - 1;
  mine.attend(cache, own(min(share, tiles - from), warp), rest,
              has_tail ? own((tail.count + 15) / 16, last) : 0);
  finish<F>(call, place, mine, F::WARPS, shared);
}

// A task, once its queries, what they see and the tail are in shared memory; by all of a block.  The
// tail belongs to the last split.
template <class F>
__device__ void attend(const Call<typename F::S>& call, const Place& place,
                       const Tail<typename F::S>& tail, Shared<F>& shared) {
  const size_t head = size_t(place.batch) * call.kv_heads + place.kv_head;
  const auto keys = call.keys + head * call.length * F::D;
  const auto values = call.values + head * call.length * F::DV;
  const size_t all = reinterpret_cast<size_t>(keys) | reinterpret_cast<size_t>(values) |
                     reinterpret_cast<size_t>(tail.keys) | reinterpret_cast<size_t>(tail.values);
  if (all % 16 == 0)
    attend_to<F, true>(keys, values, call, place, tail, shared);
  else
    attend_to<F, false>(keys, values, call, place, tail, shared);
}

// Queries as they are given.
template <class F>
__device__ void decode_attention(const Call<typename F::S>& call, int task, Shared<F>& shared) {
  using S = typename F::S;
  const Place place = place_of<F>(call, task);
  const Limits limits = limits_of(call, place);
  for (int i = threadIdx.x; i < F::ROWS * F::D; i += F::THREADS) {
    const int row = place.row + i / F::D, head = row / call.queries;
    const bool there = row_of(call, place, i / F::D) >= 0;
    const int at = (place.kv_head * (call.heads / call.kv_heads) + head) * call.q_head +
                   row % call.queries * call.q_query + i % F::D;
    shared.query[i / F::D][i % F::D] =
        there ? call.q[size_t(place.batch) * call.q_batch + at] : S(0.0f);
  }
  see<F>(call, place, limits, shared);
  __syncthreads();
  attend<F>(call, place, Tail<S>{nullptr, nullptr, 0, 0, -1}, shared);
}

// One row of what the tasks of several splits have written, by DV threads; `shared` has room for two
// numbers of each split.
template <int DV, typename S>
__device__ void join(const Call<S>& call, int row, float* shared) {
  const float* parts = call.parts + size_t(row) * call.splits * (DV + 2);
  for (int i = threadIdx.x; i < 2 * call.splits; i += DV)
    shared[i] = parts[i / 2 * (DV + 2) + DV + i % 2];
  float result = 0, peak = -INFINITY, sum = 0;
  __syncthreads();
  for (int i = 0; i < call.splits; i++) peak = fmaxf(peak, shared[2 * i]);
#pragma unroll 8
  for (int i = 0; i < call.splits; i++) {
    const float weight = peak == -INFINITY ? 0 : exp2f(shared[2 * i] - peak);
    sum += weight * shared[2 * i + 1];
    result += weight * parts[i * (DV + 2) + threadIdx.x];
  }
  const float shrink = with_sink(call, row, peak, sum);
  call.y[size_t(row) * DV + threadIdx.x] = S(result * shrink / sum);
}

}  // namespace qgraph
