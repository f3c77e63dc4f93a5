// Attention of one token a batch that is itself the newest key: q and k are rotated here, k and v
// stored.  No kernel writes into a cache, which others may hold: the new row goes to the end of a tail,
// a few rows beside the cache that are copied with each token, or into a copy of the whole.

namespace qgraph {

// What `mx.fast.rope` is given; of the base the logarithm to base 2.  0 `dims` turn nothing.
struct Rope {
  int dims;
  bool traditional;
  float base, scale;
  const float* freqs;
};

// The other number of the pair that number i of a head is turned with; i itself beyond `dims`.
__device__ __forceinline__ int partner(int i, const Rope& rope) {
  if (i >= rope.dims) return i;
  if (rope.traditional) return i ^ 1;
  return i < rope.dims / 2 ? i + rope.dims / 2 : i - rope.dims / 2;
}

// Cosine and sine of the angle that a pair is turned by, as MLX's `rope` has it.
__device__ __forceinline__ void turn(int pair, int position, const Rope& rope, float (&angle)[2]) {
  const float frequency = rope.freqs
                              ? 1.0f / rope.freqs[pair]
                              : exp2f(-(float(pair) / float(rope.dims / 2)) * rope.base);
  const float theta = rope.scale * float(position) * frequency;
  angle[0] = cosf(theta), angle[1] = sinf(theta);
}

// Number i of a head, with its partner, turned by the angles of all pairs.
template <typename S>
__device__ __forceinline__ S turned(int i, S own, S other, const Rope& rope,
                                    const float (*angles)[2]) {
  if (i >= rope.dims) return own;
  const bool first = rope.traditional ? i % 2 == 0 : i < rope.dims / 2;
  const float* angle = angles[rope.traditional ? i / 2 : i % (rope.dims / 2)];
  const float sine = first ? -angle[1] : angle[1];
  return S(float(own) * angle[0] + float(other) * sine);
}

// The token of each batch: its heads, where it goes, and what was there before and is after.
//   Without tail_positions: new_keys and new_values are copies of the caches with the token in its place.
//   With: tails (batch, kv_heads, TAIL, D) whose row i has position tail_positions[i]: -1 where it is
//   unused, FAR where it is none of the cache.
template <typename S>
struct Token {
  const S *k, *v;
  int k_batch, v_batch;  // elements from one to the next
  const int* place;
  Rope rope;
  const S *tail_keys, *tail_values;
  const int* tail_positions;
  S *new_keys, *new_values;
  int* new_positions;
  const int* offset = nullptr;  // the number that it is turned by; null: its place
};

// Part `part` of `parts` of `count` rows of D numbers, all but row `but`.
template <typename S>
__device__ void copy_rows(const S* from, S* to, int count, int dim, int but, int part, int parts) {
  const bool aligned = (reinterpret_cast<size_t>(from) | reinterpret_cast<size_t>(to)) % 16 == 0;
#pragma unroll 4
  for (int i = part; i < count * (dim / 8); i += parts) {
    if (i / (dim / 8) == but) continue;
    if (aligned)
      *reinterpret_cast<Eight<S>*>(to + size_t(i) * 8) = load<true>(from + size_t(i) * 8);
    else
      for (int j = 0; j < 8; j++) to[size_t(i) * 8 + j] = from[size_t(i) * 8 + j];
  }
}

// Which position each row of the tail stands for, the token's last; -1 for what a later row replaces.
template <class F>
__device__ void read_positions(const Token<typename F::S>& token, int length, bool writes,
                               Shared<F>& shared, Tail<typename F::S>& tail) {
  const int i = threadIdx.x, place = token.place[0];
  const int here = place >= 0 && place < length ? place : FAR;
  int mine = -1;
  if (token.tail_positions) {
    if (i < F::TAIL) mine = token.tail_positions[i];
    tail.count = min(__syncthreads_count(mine != -1), F::TAIL - 1) + 1;
  } else {
    tail.count = 1;
  }
  if (i == tail.count - 1) mine = here;
  if (i < F::TAIL) shared.at[i] = mine;
  __syncthreads();
  bool replaced = false;
  tail.low = FAR, tail.high = -1;
  for (int j = 0; j < tail.count; j++) {
    const int at = shared.at[j];
    if (at == FAR) continue;
    tail.low = min(tail.low, at), tail.high = max(tail.high, at);
    replaced |= j > i && at == mine;
  }
  const bool seen = i < tail.count && !replaced && mine != FAR;
  tail.dense = __syncthreads_count(seen) == tail.high - tail.low + 1;
  if (i < F::TAIL && (replaced || mine == FAR)) shared.at[i] = -1;
  if (token.new_positions && i < F::TAIL && writes) token.new_positions[i] = mine;
}

// A task of `decode_attention` of one query a head; the token is stored by whoever has the last split.
template <class F>
__device__ void cached_attention(const Call<typename F::S>& call, const Token<typename F::S>& token,
                                 int task, Shared<F>& shared) {
  using S = typename F::S;
  const Place place = place_of<F>(call, task);
  const int sharing = call.heads / call.kv_heads, position = token.place[0];
  const Limits limits = limits_of(call, place);
  const size_t head = size_t(place.batch) * call.kv_heads + place.kv_head;
  const S* q = call.q + size_t(place.batch) * call.q_batch +
               (place.kv_head * sharing + place.row) * F::D;
  const S* k = token.k + size_t(place.batch) * token.k_batch + place.kv_head * F::D;
  const S* v = token.v + size_t(place.batch) * token.v_batch + place.kv_head * F::D;

  // The rows of queries, then the key: read while the position is under way.
  constexpr int EACH = ((F::ROWS + 1) * F::D + F::THREADS - 1) / F::THREADS;
  S own[EACH], other[EACH];
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    const int i = n * F::THREADS + threadIdx.x, row = i / F::D;
    const bool there = row < F::ROWS ? row_of(call, place, row) >= 0 : row == F::ROWS;
    const S* from = row < F::ROWS ? q + row * F::D : k;
    own[n] = there ? from[i % F::D] : S(0.0f);
    other[n] = there ? from[partner(i % F::D, token.rope)] : S(0.0f);
  }
  Tail<S> tail{nullptr, nullptr, 0, 0, -1};
  read_positions<F>(token, call.length, task == 0, shared, tail);

  const bool in_tail = token.tail_positions != nullptr;
  const bool inside = position >= 0 && position < call.length;
  const int rows = in_tail ? F::TAIL : call.length, row = in_tail ? tail.count - 1 : position;
  S* new_keys = token.new_keys + head * rows * F::D;
  S* new_values = token.new_values + head * rows * F::D;
  const bool last = place.split == call.splits - 1;
  if (in_tail && last) {
    const size_t start = head * rows * F::D;
    copy_rows(token.tail_keys + start, new_keys, rows, F::D, row, threadIdx.x, F::THREADS);
    copy_rows(token.tail_values + start, new_values, rows, F::D, row, threadIdx.x, F::THREADS);
  }
  const int offset = token.offset ? token.offset[0] : position;
  for (int i = threadIdx.x; i < token.rope.dims / 2; i += F::THREADS)
    turn(i, offset, token.rope, shared.angles[i]);
  see<F>(call, place, limits, shared);
  __syncthreads();
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    const int i = n * F::THREADS + threadIdx.x, which = i / F::D, number = i % F::D;
    const S now = turned(number, own[n], other[n], token.rope, shared.angles);
    if (which < F::ROWS) shared.query[which][number] = now;
    if (which == F::ROWS && last && (in_tail || inside)) {
      new_keys[size_t(row) * F::D + number] = now;
      new_values[size_t(row) * F::D + number] = v[number];
    }
  }
  __syncthreads();
  if (in_tail) {
    tail.keys = new_keys, tail.values = new_values;
  } else {
    tail.keys = new_keys + size_t(inside ? row : 0) * F::D;
    tail.values = new_values + size_t(inside ? row : 0) * F::D;
    const int tile = place.row / F::ROWS, tiles = (sharing + F::ROWS - 1) / F::ROWS;
    const int part = (tile * call.splits + place.split) * F::THREADS + threadIdx.x;
    const int parts = tiles * call.splits * F::THREADS;
    const size_t start = head * call.length * F::D;
    copy_rows(call.keys + start, new_keys, rows, F::D, row, part, parts);
    copy_rows(call.values + start, new_values, rows, F::D, row, part, parts);
  }
  attend<F>(call, place, tail, shared);
}

// A cache with the rows of a tail in their places, the later ones over the earlier.  A block of THREADS
// takes every gridDim.x-th piece.
template <typename S, int D, int TAIL, int THREADS>
__device__ void merge_tail(const S* cache, const S* tail, const int* positions, S* merged, int heads,
                           int length) {
  __shared__ int at[TAIL];
  for (int i = threadIdx.x; i < TAIL; i += THREADS) at[i] = positions[i];
  __syncthreads();
  int low = FAR, high = -1;
  for (int i = 0; i < TAIL; i++) {
    if (at[i] < 0 || at[i] == FAR) continue;
    low = min(low, at[i]), high = max(high, at[i]);
  }
  const bool aligned = (reinterpret_cast<size_t>(cache) | reinterpret_cast<size_t>(tail)) % 16 == 0;
  const size_t pieces = size_t(heads) * length * (D / 8), step = size_t(gridDim.x) * THREADS;
#pragma unroll 4
  for (size_t i = size_t(blockIdx.x) * THREADS + threadIdx.x; i < pieces; i += step) {
    const int row = i / (D / 8) % length;
    const S* from = cache + i * 8;
    if (row >= low && row <= high) {
      for (int j = 0; j < TAIL; j++) {
        if (at[j] == row)
          from = tail + (i / (D / 8) / length * TAIL + j) * D + i % (D / 8) * 8;
      }
    }
    reinterpret_cast<Eight<S>*>(merged)[i] = aligned ? load<true>(from) : load<false>(from);
  }
}

}  // namespace qgraph
