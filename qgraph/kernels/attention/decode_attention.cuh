// softmax(scale q k^T + mask) v for few queries, over keys of a cache, split over the whole GPU.
//
// A task is a part of the keys of one key head, read once for up to ROWS of the queries that share it, by
// the warps of a block (attention_warp.cuh).  The block joins its warps, and `join` the tasks (Dao et al.,
// "Flash-Decoding for long-context inference", 2023).

namespace qgraph {

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

// A row whose keys are all hidden by a mask of -infinity gives 0, and not 0 / 0: other rows read it later
// as a key that is hidden, and a number that is none times 0 is none.
__device__ __forceinline__ float over(float shrink, float sum) { return sum == 0 ? 0 : shrink / sum; }

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
    const float shrink = whole < 0 ? 0 : with_sink(call, whole, peak, sum);
    weight *= over(shrink, sum);
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
  call.y[size_t(row) * DV + threadIdx.x] = S(result * over(shrink, sum));
}

}  // namespace qgraph
