// softmax(scale q k^T) v for one query a head, over the keys up to position `last`; in
// `cached_attention` after q and k are rotated and k and v have taken their place in the cache.
//
// SPLITS blocks serve one query head, each a range of the keys.  LANES lanes read a key, 8 numbers
// each; each group of them keeps its own maximum, sum and result (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018).  The block joins them, and `join_splits` the blocks
// (Dao et al., "Flash-Decoding for long-context inference", 2023).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace qgraph {

template <typename T>
struct alignas(16) Eight {
  T v[8];
};

// Both begin where 16 bytes can be read at once, unless somebody cut them out of something else.
template <typename T>
__device__ __forceinline__ bool aligned(const T* a, const T* b) {
  return (reinterpret_cast<size_t>(a) | reinterpret_cast<size_t>(b)) % 16 == 0;
}

template <bool VALUE>
struct Flag {
  static constexpr bool value = VALUE;
};

template <bool ALIGNED, typename T>
__device__ __forceinline__ Eight<T> load(const T* from) {
  Eight<T> eight;
  if constexpr (ALIGNED) {
    eight = *reinterpret_cast<const Eight<T>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) eight.v[i] = from[i];
  }
  return eight;
}

// The keys that a block reads, of those that are seen.
struct Range {
  int from, to;
};

__device__ __forceinline__ Range range_of(int split, int splits, int length) {
  const int share = (length + splits - 1) / splits;
  return {min(split * share, length), min((split + 1) * share, length)};
}

// Maximum, sum and sum of values, all by powers of 2, of some of the keys.
template <int N>
struct Part {
  float peak = -INFINITY, sum = 0, result[N] = {};

  __device__ void rescale(float now) {
    const float keep = now == -INFINITY ? 0 : exp2f(peak - now);
    peak = now;
    sum *= keep;
#pragma unroll
    for (int i = 0; i < N; i++) result[i] *= keep;
  }
};

// The block's range of keys; `query` holds scale * log2(e) * q.  Key `now`, if it is one of them, is
// not in the cache but in `key_now` and `value_now`.  Leaves the result of column threadIdx.x, where
// that is below D.
template <bool ALIGNED, typename T, int D, int WARPS>
__device__ Part<1> attend(const float* query, const T* keys, const T* values, Range range,
                          int now = -1, const T* key_now = nullptr, const T* value_now = nullptr) {
  constexpr int LANES = D / 8, GROUPS = WARPS * 32 / LANES;
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  float q[8];
#pragma unroll
  for (int i = 0; i < 8; i++) q[i] = query[lane * 8 + i];

  // All lanes of a warp take part in every turn: the shuffles need them.
  constexpr int AT_ONCE = 4;  // keys whose loads are under way together
  Part<8> mine;
  for (int start = range.from; start < range.to; start += GROUPS * AT_ONCE) {
    Eight<T> key[AT_ONCE], value[AT_ONCE];
    float score[AT_ONCE] = {};
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      const int row = min(start + j * GROUPS + group, range.to - 1);
      const size_t at = size_t(row) * D + lane * 8;
      key[j] = load<ALIGNED>(keys + at);
      value[j] = load<ALIGNED>(values + at);
      if (row == now) {
        key[j] = load<true>(key_now + lane * 8);
        value[j] = load<true>(value_now + lane * 8);
      }
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
#pragma unroll
      for (int i = 0; i < 8; i++) score[j] += q[i] * float(key[j].v[i]);
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) score[j] += __shfl_xor_sync(0xffffffff, score[j], step);
    }
    float peak = mine.peak;
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      if (start + j * GROUPS + group >= range.to) score[j] = -INFINITY;
      peak = fmaxf(peak, score[j]);
    }
    mine.rescale(peak);
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      if (score[j] == -INFINITY) continue;  // beyond the range; a score may also be no number
      const float p = exp2f(score[j] - peak);
      mine.sum += p;
#pragma unroll
      for (int i = 0; i < 8; i++) mine.result[i] += p * float(value[j].v[i]);
    }
  }

  // The groups of a warp, then the warps.
#pragma unroll
  for (int step = LANES; step < 32; step *= 2) {
    mine.rescale(fmaxf(mine.peak, __shfl_xor_sync(0xffffffff, mine.peak, step)));
    mine.sum += __shfl_xor_sync(0xffffffff, mine.sum, step);
#pragma unroll
    for (int i = 0; i < 8; i++) mine.result[i] += __shfl_xor_sync(0xffffffff, mine.result[i], step);
  }
  __shared__ float peaks[WARPS], sums[WARPS], results[WARPS][D];
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) peaks[warp] = mine.peak, sums[warp] = mine.sum;
  if (threadIdx.x % 32 < LANES) {
#pragma unroll
    for (int i = 0; i < 8; i++) results[warp][lane * 8 + i] = mine.result[i];
  }
  __syncthreads();
  Part<1> joined;
  if (threadIdx.x < D) {
    for (int from = 0; from < WARPS; from++) joined.peak = fmaxf(joined.peak, peaks[from]);
    for (int from = 0; from < WARPS; from++) {
      const float weight = joined.peak == -INFINITY ? 0 : exp2f(peaks[from] - joined.peak);
      joined.sum += weight * sums[from];
      joined.result[0] += weight * results[from][threadIdx.x];
    }
  }
  return joined;
}

// The result of one block a head, or what `join_splits` makes it of: results, then peaks and sums.
template <int D, int SPLITS, typename Out>
__device__ void write(const Part<1>& part, Out* y) {
  if (threadIdx.x >= D) return;
  const size_t block = blockIdx.x;
  if constexpr (SPLITS == 1) {
    y[block * D + threadIdx.x] = Out(part.result[0] / part.sum);
  } else {
    float* parts = y + block * (D + 2);
    parts[threadIdx.x] = part.result[0];
    if (threadIdx.x == 0) parts[D] = part.peak, parts[D + 1] = part.sum;
  }
}

template <typename T, int D, int SPLITS>
__device__ void join_splits(const float* parts, T* y) {
  parts += size_t(blockIdx.x) * SPLITS * (D + 2);
  Part<1> joined;
#pragma unroll 4
  for (int i = 0; i < SPLITS; i++) joined.peak = fmaxf(joined.peak, parts[i * (D + 2) + D]);
#pragma unroll 4
  for (int i = 0; i < SPLITS; i++) {
    const float weight = exp2f(parts[i * (D + 2) + D] - joined.peak);
    joined.sum += weight * parts[i * (D + 2) + D + 1];
    joined.result[0] += weight * parts[i * (D + 2) + threadIdx.x];
  }
  y[size_t(blockIdx.x) * D + threadIdx.x] = T(joined.result[0] / joined.sum);
}

// What a block computes: which head of which batch, which keys, and the scale of its query.
template <int SPLITS, int SCALE_BITS>
struct Task {
  int head, batch;
  size_t kv;  // the first number of its keys
  Range all, seen;
  float scale;

  __device__ Task(int heads, int kv_heads, int length, int dim, int last) {
    const int query = blockIdx.x / SPLITS;
    head = query % heads, batch = query / heads;
    kv = (size_t(batch) * kv_heads + head / (heads / kv_heads)) * length * dim;
    all = range_of(blockIdx.x % SPLITS, SPLITS, length);
    // Below 0 no key is seen: all weigh the same then, as under a mask of MLX that hides all.
    const bool blind = last < 0;
    seen = {all.from, blind || last >= length ? all.to : min(all.to, last + 1)};
    scale = blind ? 0 : __int_as_float(SCALE_BITS) * 1.44269504f;  // exp2 is fast
  }
};

template <typename T, int D, int WARPS, int SPLITS, int SCALE_BITS, typename Out>
__device__ void decode_attention(const T* q, const T* k, const T* v, const int* last, Out* y,
                                 int heads, int kv_heads, int length) {
  const Task<SPLITS, SCALE_BITS> task(heads, kv_heads, length, D, last[0]);
  __shared__ float query[D];
  if (threadIdx.x < D)
    query[threadIdx.x] = task.scale * float(q[size_t(blockIdx.x / SPLITS) * D + threadIdx.x]);
  __syncthreads();
  if (aligned(k, v))
    write<D, SPLITS>(attend<true, T, D, WARPS>(query, k + task.kv, v + task.kv, task.seen), y);
  else
    write<D, SPLITS>(attend<false, T, D, WARPS>(query, k + task.kv, v + task.kv, task.seen), y);
}

// Number i of a head turned by its position, as MLX's `rope` does it; beyond DIMS as it is.
template <int DIMS, bool TRADITIONAL, int BASE_BITS, int SCALE_BITS, typename T>
__device__ T rotated(const T* x, int i, int position, const float* freqs) {
  if (i >= DIMS) return x[i];
  constexpr int HALF = DIMS ? DIMS / 2 : 1;
  const int pair = TRADITIONAL ? i / 2 : i % HALF;
  const bool first = TRADITIONAL ? i % 2 == 0 : i < HALF;
  const float a = float(x[TRADITIONAL ? 2 * pair : pair]);
  const float b = float(x[TRADITIONAL ? 2 * pair + 1 : pair + HALF]);
  const float frequency = freqs ? 1.0f / freqs[pair]
                                : exp2f(-(float(pair) / float(HALF)) * __int_as_float(BASE_BITS));
  const float theta = __int_as_float(SCALE_BITS) * float(position) * frequency;
  const float c = cosf(theta), s = sinf(theta);
  return T(first ? a * c - b * s : a * s + b * c);
}

// A head of `cache` in its new place, with `now` as row `position`; each of the blocks that share
// the head copies some.
template <bool ALIGNED, typename T, int D>
__device__ void copy_rows(const T* from, T* to, Range range, int position, const T* now, int first,
                          int step) {
#pragma unroll 4
  for (int i = range.from * (D / 8) + first; i < range.to * (D / 8); i += step) {
    Eight<T> eight = load<ALIGNED>(from + size_t(i) * 8);
    if (i / (D / 8) == position) eight = load<true>(now + i % (D / 8) * 8);
    reinterpret_cast<Eight<T>*>(to)[i] = eight;
  }
}

// BASE_BITS and ROPE_SCALE_BITS are float32s, the base as its logarithm to base 2.
template <typename T, int D, int WARPS, int SPLITS, int SCALE_BITS, int DIMS, bool TRADITIONAL,
          int BASE_BITS, int ROPE_SCALE_BITS, typename Out>
__device__ void cached_attention(const T* q, int q_stride, const T* k, int k_stride, const T* v,
                                 int v_stride, const T* keys, const T* values, const int* place,
                                 const int* last, const float* freqs, Out* y, T* new_keys,
                                 T* new_values, int heads, int kv_heads, int length) {
  const Task<SPLITS, SCALE_BITS> task(heads, kv_heads, length, D, last[0]);
  const int sharing = heads / kv_heads, position = place[0];
  q += size_t(task.batch) * q_stride + task.head * D;
  k += size_t(task.batch) * k_stride + task.head / sharing * D;
  v += size_t(task.batch) * v_stride + task.head / sharing * D;

  __shared__ float query[D];
  __shared__ __align__(16) T key_now[D], value_now[D];
  for (int i = threadIdx.x; i < 2 * D; i += WARPS * 32) {
    const T* x = i < D ? q : k;
    const T turned =
        rotated<DIMS, TRADITIONAL, BASE_BITS, ROPE_SCALE_BITS>(x, i % D, position, freqs);
    if (i < D)
      query[i] = task.scale * float(turned);
    else
      key_now[i - D] = turned;
  }
  if (threadIdx.x < D) value_now[threadIdx.x] = v[threadIdx.x];
  __syncthreads();

  const int first = task.head % sharing * WARPS * 32 + threadIdx.x, step = sharing * WARPS * 32;
  keys += task.kv, values += task.kv, new_keys += task.kv, new_values += task.kv;
  auto finish = [&](auto fits) {
    constexpr bool ALIGNED = decltype(fits)::value;
    copy_rows<ALIGNED, T, D>(keys, new_keys, task.all, position, key_now, first, step);
    copy_rows<ALIGNED, T, D>(values, new_values, task.all, position, value_now, first, step);
    write<D, SPLITS>(attend<ALIGNED, T, D, WARPS>(query, keys, values, task.seen, position, key_now,
                                                  value_now),
                     y);
  };
  if (aligned(keys, values))
    finish(Flag<true>{});
  else
    finish(Flag<false>{});
}

}  // namespace qgraph
