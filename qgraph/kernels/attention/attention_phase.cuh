// Attention of one token a batch as the first phase of a region.  Its tasks, as those of
// `cached_attention`, are shared out among the blocks of a grid; where several have parts of the same
// keys' result, whoever is the last of them joins these.
//
// All other blocks wait for it, so it is short, not busy: a load that waits for another costs as much
// as all else together, so all is asked for at once, and the warps of a block meet four times.

namespace qgraph {

template <class F>
struct SharedOfPhase {
  Shared<F> shared;
  alignas(16) typename F::S key[F::D], value[F::DV];  // of the token
  int count, low, high, dense;                        // of the tail
};

// What each thread reads of a token and its tail.
template <class F, int SHARING>
struct Asked {
  using S = typename F::S;
  static constexpr int ROWS = SHARING < F::ROWS ? SHARING : F::ROWS, PAIRS = F::D / 2;
  static constexpr int TURNS = ((ROWS + 1) * PAIRS + F::THREADS - 1) / F::THREADS;
  static constexpr int EIGHTS = F::TAIL * F::D / 8;  // of the keys of a tail, as many of its values
  static constexpr int COPIES = (2 * EIGHTS + F::THREADS - 1) / F::THREADS;
  static constexpr int POSITIONS = (F::TAIL + 31) / 32;  // of a lane of the first warp

  int position, last, at[POSITIONS];
  S one[TURNS], other[TURNS], value;  // numbers of queries and key that turn together
  Eight<S> tail[COPIES];

  // A pair of the query of a row, or of the key after the last of them, and where it stands.
  struct Pair {
    int row, number, one, other;
    bool turns, there;

    __device__ Pair(const Place& place, const Rope& rope, int turn) {
      const int i = turn * F::THREADS + threadIdx.x, turned = rope.dims / 2;
      row = i / PAIRS, number = i % PAIRS, turns = number < turned;
      there = row < ROWS ? place.row + row < SHARING : row == ROWS;
      one = turns && !rope.traditional ? number : 2 * number;
      other = turns && !rope.traditional ? number + turned : one + 1;
    }
  };

  __device__ Asked(const Call<S>& call, const Token<S>& token, const Place& place) {
    position = token.place[0], last = limits_of(call, place).last;
#pragma unroll
    for (int e = 0; e < POSITIONS; e++) {
      const int row = 32 * e + threadIdx.x;
      at[e] = threadIdx.x < 32 && row < F::TAIL ? token.tail_positions[row] : -1;
    }
    const S* q = call.q + size_t(place.batch) * call.q_batch +
                 (place.kv_head * SHARING + place.row) * F::D;
    const S* k = token.k + size_t(place.batch) * token.k_batch + place.kv_head * F::D;
    const S* v = token.v + size_t(place.batch) * token.v_batch + place.kv_head * F::DV;
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
      const Pair pair(place, token.rope, turn);
      const S* from = pair.row < ROWS ? q + pair.row * F::D : k;
      if (pair.there) one[turn] = from[pair.one], other[turn] = from[pair.other];
    }
    static_assert(F::DV <= F::THREADS);
    if (threadIdx.x < F::DV) value = v[threadIdx.x];
    const size_t start = tail_of(call, place);
#pragma unroll
    for (int copy = 0; copy < COPIES; copy++) {
      const int i = copy * F::THREADS + threadIdx.x, keys = i < EIGHTS;
      const S* from = (keys ? token.tail_keys : token.tail_values) + start;
      if (i < 2 * EIGHTS) tail[copy] = load<true>(from + (keys ? i : i - EIGHTS) * 8);
    }
  }

  static __device__ __forceinline__ size_t tail_of(const Call<S>& call, const Place& place) {
    return (size_t(place.batch) * call.kv_heads + place.kv_head) * F::TAIL * F::D;
  }

  // The token into shared memory, queries and key turned.
  __device__ void take(const Token<S>& token, const Place& place, SharedOfPhase<F>& all) const {
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
      const Pair pair(place, token.rope, turn);
      if (!pair.there) continue;
      S a = one[turn], b = other[turn];
      if (pair.turns) {
        float angle[2];
        qgraph::turn(pair.number, position, token.rope, angle);
        const float x = float(a), y = float(b);
        a = S(x * angle[0] + y * -angle[1]), b = S(y * angle[0] + x * angle[1]);
      }
      S* to = pair.row < ROWS ? all.shared.query[pair.row] : all.key;
      to[pair.one] = a, to[pair.other] = b;
    }
    if (threadIdx.x < F::DV) all.value[threadIdx.x] = value;
  }

  // The tail as it was; the token's row comes after it.
  __device__ void copy_tail(const Call<S>& call, const Token<S>& token, const Place& place) const {
    const size_t start = tail_of(call, place);
#pragma unroll
    for (int copy = 0; copy < COPIES; copy++) {
      const int i = copy * F::THREADS + threadIdx.x, keys = i < EIGHTS;
      S* to = (keys ? token.new_keys : token.new_values) + start;
      if (i < 2 * EIGHTS)
        *reinterpret_cast<Eight<S>*>(to + (keys ? i : i - EIGHTS) * 8) = tail[copy];
    }
  }

  // What `read_positions` does, by the first warp; a row's position is in lane row % 32.
  __device__ void take_positions(const Token<S>& token, int length, bool writes,
                                 SharedOfPhase<F>& all) const {
    const int lane = threadIdx.x;
    int mine[POSITIONS], seen[POSITIONS], used = 0;
#pragma unroll
    for (int e = 0; e < POSITIONS; e++) {
      mine[e] = at[e];
      used += __popc(__ballot_sync(0xffffffff, mine[e] != -1));
    }
    const int count = min(used, F::TAIL - 1) + 1;
    int low = FAR, high = -1;
#pragma unroll
    for (int e = 0; e < POSITIONS; e++) {
      if (32 * e + lane == count - 1) mine[e] = position >= 0 && position < length ? position : FAR;
      seen[e] = mine[e] == FAR ? -1 : mine[e];
    }
    for (int row = 0; row < count; row++) {
      int here = 0;
#pragma unroll
      for (int e = 0; e < POSITIONS; e++)
        if (row / 32 == e) here = __shfl_sync(0xffffffff, mine[e], row % 32);
      if (here == FAR) continue;
      low = min(low, here), high = max(high, here);
#pragma unroll
      for (int e = 0; e < POSITIONS; e++)
        if (row > 32 * e + lane && here == mine[e]) seen[e] = -1;  // a later one counts
    }
    int distinct = 0;
#pragma unroll
    for (int e = 0; e < POSITIONS; e++) {
      const int row = 32 * e + lane;
      distinct += __popc(__ballot_sync(0xffffffff, row < count && seen[e] != -1));
      if (row >= F::TAIL) continue;
      all.shared.at[row] = seen[e];
      if (writes) token.new_positions[row] = mine[e];
    }
    if (lane == 0) {
      all.count = count, all.low = low, all.high = high;
      all.dense = distinct == high - low + 1;
    }
  }
};

// A task, by all of a block.
template <class F, int SHARING, int SPLITS>
__device__ void attention_task(const Call<typename F::S>& call, const Token<typename F::S>& token,
                               int task, SharedOfPhase<F>& all) {
  using S = typename F::S;
  using W = Warp<F, true>;
  Shared<F>& shared = all.shared;
  const Place place = place_of<F>(call, task);
  const int warp = threadIdx.x / 32;
  const Asked<F, SHARING> asked(call, token, place);

  const size_t head = (size_t(place.batch) * call.kv_heads + place.kv_head) * call.length * F::D;
  const auto tile_of_cache = [&](int i) {
    return Tile<S>{call.keys + head, call.values + head, i * 16, call.length, nullptr};
  };
  Eight<S> keys[2][W::KEY_CHUNKS], values[4][W::VALUE_CHUNKS];
  // Of keys that no other block reads, a warp's first are known before it is known how many there are.
  bool read = SPLITS == 1 && warp * 16 < call.length;
  if (read) W::read(tile_of_cache(warp), keys), W::read_values(tile_of_cache(warp), values);

  asked.take(token, place, all);
  const bool last = place.split == call.splits - 1;
  if (last) asked.copy_tail(call, token, place);
  if (warp == 0) asked.take_positions(token, call.length, task == 0, all);
  // Every row of a region sees the keys up to `to`; where there is none, all weigh the same.
  const bool blind = asked.last < 0;
  const int to = blind ? call.length : min(asked.last + 1, call.length), tiles = (to + 15) / 16;
  const int share = (tiles + call.splits - 1) / call.splits, from = place.split * share;
  const int of_cache = max(min(share, tiles - from), 0);
  if (threadIdx.x < F::ROWS) {
    shared.from[threadIdx.x] = 0, shared.to[threadIdx.x] = to;
    shared.scale[threadIdx.x] = blind ? 0 : call.scale * LOG2_E;
  }
  __syncthreads();

  const size_t start = asked.tail_of(call, place);
  const int fresh = all.count - 1;
  if (last && threadIdx.x < F::D) {
    token.new_keys[start + fresh * F::D + threadIdx.x] = all.key[threadIdx.x];
    token.new_values[start + fresh * F::D + threadIdx.x] = all.value[threadIdx.x];
  }
  const Tail<S> tail{token.tail_keys + start, token.tail_values + start, all.count, all.low,
                     all.high, all.dense != 0};
  const int all_tiles = of_cache + (last ? (all.count + 15) / 16 : 0);
  W mine(call, place, shared, tail, 0, to);
  for (int i = warp; i < all_tiles; i += F::WARPS) {
    Tile<S> tile = tile_of_cache(from + i);
    if (i >= of_cache)
      tile = {tail.keys, tail.values, (i - of_cache) * 16, all.count, shared.at, fresh, all.key,
              all.value};
    if (!read || i >= of_cache) W::read(tile, keys), W::read_values(tile, values);
    read = false;
    float scores[F::TILES][4];
    mine.score(keys, scores);
    mine.weigh(tile, scores);
    mine.add(tile, scores, values);
  }
  finish<F, SHARING>(call, place, mine, min(all_tiles, F::WARPS), shared);
}

// The parts of a task's rows become their results; by all of a block, once all parts are written.
template <class F>
__device__ void join_parts(const Call<typename F::S>& call, const Place& place, Shared<F>& shared) {
  float* weights = &shared.exchange[0][0][0];  // of each row and split: maximum, then weight; sum
  static_assert(sizeof(shared.exchange) >= sizeof(float) * 2 * F::ROWS * 132);
  for (int i = threadIdx.x; i < F::ROWS * call.splits * 2; i += F::THREADS) {
    const int row = row_of(call, place, i / 2 / call.splits);
    if (row < 0) continue;
    const size_t part = size_t(row) * call.splits + i / 2 % call.splits;
    weights[i] = phases::load_shared(call.parts + part * (F::DV + 2) + F::DV + i % 2);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < F::ROWS * F::DV; i += F::THREADS) {
    const int row = row_of(call, place, i / F::DV);
    if (row < 0) continue;
    const float* own = weights + i / F::DV * call.splits * 2;
    const float* parts = call.parts + size_t(row) * call.splits * (F::DV + 2) + i % F::DV;
    float result = 0, peak = -INFINITY, sum = 0;
    for (int s = 0; s < call.splits; s++) peak = fmaxf(peak, own[2 * s]);
#pragma unroll 8
    for (int s = 0; s < call.splits; s++) {
      const float weight = peak == -INFINITY ? 0 : exp2f(own[2 * s] - peak);
      sum += weight * own[2 * s + 1];
      result += weight * phases::load_shared(parts + s * (F::DV + 2));
    }
    const float shrink = with_sink(call, row, peak, sum);
    call.y[size_t(row) * F::DV + i % F::DV] = typename F::S(result * shrink / sum);
  }
}

// All of the phase; `counters`, one of each SPLITS tasks, are 0 before and after.
template <class F, int SHARING, int TASKS, int SPLITS>
__device__ void attention_phase(const Call<typename F::S>& call, const Token<typename F::S>& token,
                                unsigned* counters, SharedOfPhase<F>& all) {
  Shared<F>& shared = all.shared;
  for (int task = blockIdx.x; task < TASKS; task += gridDim.x) {
    attention_task<F, SHARING, SPLITS>(call, token, task, all);
    __syncthreads();
    if constexpr (SPLITS > 1) {
      unsigned* counter = counters + task / SPLITS;
      if (threadIdx.x == 0) shared.at[0] = phases::add_released(counter, 1) == SPLITS - 1;
      __syncthreads();
      if (shared.at[0]) {
        if (threadIdx.x == 0) *counter = 0;
        join_parts<F>(call, place_of<F>(call, task), shared);
      }
      __syncthreads();
    }
  }
}

}  // namespace qgraph
