// softmax(scale q k^T) v for one query a head, over the keys up to position `last`.
//
// A block serves one query head.  LANES lanes read a key, 8 numbers each; each group of them keeps
// its own maximum, sum and result (Milakov and Gimelshein, "Online normalizer calculation for
// softmax", 2018), and the block joins them at the end.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace qgraph {

template <typename T>
struct alignas(16) Eight {
  T v[8];
};

template <typename T, int D, int WARPS, int SCALE_BITS>
__device__ void decode_attention(const T* q, const T* k, const T* v, const int* last, T* y,
                                 int heads, int kv_heads, int length) {
  constexpr int LANES = D / 8, GROUPS = WARPS * 32 / LANES;
  const int head = blockIdx.x % heads, batch = blockIdx.x / heads;
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const size_t kv = (size_t(batch) * kv_heads + head / (heads / kv_heads)) * length * D;
  // Below 0 no key is seen: all weigh the same then, as under a mask of MLX that hides all.
  const bool blind = last[0] < 0;
  const int end = blind ? length : min(last[0], length - 1) + 1;
  const float scale = blind ? 0 : __int_as_float(SCALE_BITS) * 1.44269504f;  // exp2 is fast

  float query[8], result[8] = {}, most = -INFINITY, sum = 0;
  for (int i = 0; i < 8; i++)
    query[i] = scale * float(q[size_t(blockIdx.x) * D + lane * 8 + i]);

  // All lanes of a warp take part in every turn: the shuffles need them.
  constexpr int AT_ONCE = 4;  // keys whose loads are under way together
  for (int start = 0; start < end; start += GROUPS * AT_ONCE) {
    Eight<T> key[AT_ONCE], value[AT_ONCE];
    float score[AT_ONCE] = {};
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      const size_t from = kv + size_t(min(start + j * GROUPS + group, end - 1)) * D + lane * 8;
      key[j] = *reinterpret_cast<const Eight<T>*>(k + from);
      value[j] = *reinterpret_cast<const Eight<T>*>(v + from);
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
#pragma unroll
      for (int i = 0; i < 8; i++) score[j] += query[i] * float(key[j].v[i]);
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) score[j] += __shfl_xor_sync(0xffffffff, score[j], step);
    }
    float now = most;
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      if (start + j * GROUPS + group >= end) score[j] = -INFINITY;
      now = fmaxf(now, score[j]);
    }
    if (now == -INFINITY) continue;  // this group has seen no key yet
    const float keep = exp2f(most - now);
    most = now;
    sum *= keep;
#pragma unroll
    for (int i = 0; i < 8; i++) result[i] *= keep;
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      const float p = exp2f(score[j] - now);
      sum += p;
#pragma unroll
      for (int i = 0; i < 8; i++) result[i] += p * float(value[j].v[i]);
    }
  }

  __shared__ float peaks[GROUPS], sums[GROUPS], parts[GROUPS][D];
  if (lane == 0) peaks[group] = most, sums[group] = sum;
#pragma unroll
  for (int i = 0; i < 8; i++) parts[group][lane * 8 + i] = result[i];
  __syncthreads();
  if (threadIdx.x < D) {
    float peak = -INFINITY, total = 0, joined = 0;
    for (int from = 0; from < GROUPS; from++) peak = fmaxf(peak, peaks[from]);
    for (int from = 0; from < GROUPS; from++) {
      const float weight = exp2f(peaks[from] - peak);
      total += weight * sums[from];
      joined += weight * parts[from][threadIdx.x];
    }
    y[size_t(blockIdx.x) * D + threadIdx.x] = T(joined / total);
  }
}

}  // namespace qgraph
