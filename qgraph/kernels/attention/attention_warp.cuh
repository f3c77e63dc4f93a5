// Keys and values by one warp: from memory straight into the registers of the tensor cores' fragments.
//
// Which number of a key stands where in a sum is free, so each lane reads 16 bytes of a row and takes them
// for whatever numbers its fragment wants.  S^T = K Q^T gives for each query its scores; as P^T they are the
// other operand of O^T = V^T P^T.  Each warp keeps maximum, sum and result of its keys (Milakov and
// Gimelshein, "Online normalizer calculation for softmax", 2018).
//
// The weights P are the sum of two 16-bit numbers, and all that is float32 the sum of three of bfloat16,
// so that nothing is rounded that MLX would not round.

namespace qgraph {

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

}  // namespace qgraph
