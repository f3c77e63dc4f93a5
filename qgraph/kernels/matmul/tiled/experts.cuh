// Products of `product.cuh` whose rows have experts: all experts in one launch, rows read and written
// where they lie.

namespace qgraph {
namespace tiled {

// The sum of a warp's numbers up to this lane's.
__device__ __forceinline__ int sum_up_to(int number) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int other = __shfl_up_sync(0xffffffff, number, i);
    if (lane >= i) number += other;
  }
  return number;
}

// Puts matrices of EACH rows of x into the order of experts, by one block: where the rows of each
// expert begin, and for rows in that order where they lie in x and in y.  In which order those of one
// expert come is left to chance, and changes nothing.
inline __device__ void group_rows(const unsigned* lhs, const unsigned* rhs, int* starts,
                                  unsigned* in_x, unsigned* in_y, int matrices, int each,
                                  int experts) {
  extern __shared__ __align__(1024) char stages[];
  int* next = reinterpret_cast<int*>(stages);  // first how many, then where the next one goes
  for (int e = threadIdx.x; e < experts; e += blockDim.x) next[e] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < matrices; i += blockDim.x) atomicAdd(next + rhs[i], 1);
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    int before = 0;
    for (int from = 0; from < experts; from += 32) {
      const int own = from + lane < experts ? next[from + lane] : 0;
      const int start = before + sum_up_to(own) - own;
      if (from + lane < experts) next[from + lane] = start, starts[from + lane] = start * each;
      before = __shfl_sync(0xffffffff, start + own, 31);
    }
    if (lane == 0) starts[experts] = before * each;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < matrices; i += blockDim.x) {
    const int at = atomicAdd(next + rhs[i], 1);
    for (int j = 0; j < each; j++)
      in_x[at * each + j] = lhs[i] * each + j, in_y[at * each + j] = i * each + j;
  }
}

// The BLOCK-th portion of up to COLUMNS rows, where those of each expert begin anew; none has 0
// rows.  Rows of expert e are `starts[e]` to `starts[e + 1]`.
template <int COLUMNS>
__device__ __forceinline__ Place portion(int block, const int* starts, int experts, int& expert) {
  const int lane = threadIdx.x % 32;
  for (int from = 0, before = 0; from < experts; from += 32) {
    const int mine = from + lane;
    const int start = starts[min(mine, experts)], rows = starts[min(mine + 1, experts)] - start;
    const int own = (rows + COLUMNS - 1) / COLUMNS;
    const int sum = sum_up_to(own);
    const int at = block - before - (sum - own);
    const unsigned found = __ballot_sync(0xffffffff, at >= 0 && at < own);
    if (found) {
      const int source = __ffs(found) - 1;
      expert = from + source;
      return {__shfl_sync(0xffffffff, start + at * COLUMNS, source),
              __shfl_sync(0xffffffff, rows - at * COLUMNS, source), 0};
    }
    before += __shfl_sync(0xffffffff, sum, 31);
  }
  return {0, 0, 0};
}

// The rows at `place` by the matrix of their expert.
template <typename P, int N>
__device__ __forceinline__ void by_expert(const typename P::Number* x, const unsigned* w,
                                          const void* scales, int expert, Place place, Order order,
                                          typename P::Number* y, int k, int n_tiles) {
  extern __shared__ __align__(1024) char stages[];
  const int tile = blockIdx.y * P::tiles_down;
  place.tile = size_t(expert) * n_tiles + tile;
  P p{x, reinterpret_cast<const char*>(w), static_cast<const char*>(scales), k, n_tiles - tile,
      place, order, reinterpret_cast<size_t>(x) % 16 == 0};
  p.run(stages, 0, (k + P::depth - 1) / P::depth);
  p.join(stages);
  p.template write<N % 2 == 0>(y, N > 0 ? N : n_tiles * 64);
}

// Rows of y = rows of x by the matrices of their experts; rows are in the order of experts, and
// `order` says where they lie.
template <typename P, int N>
__device__ void gathered_product(const typename P::Number* x, const unsigned* w,
                                 const void* scales, const int* starts, Order order,
                                 typename P::Number* y, int k, int n_tiles, int experts) {
  int expert = 0;
  const Place place = portion<P::rows_of_x>(blockIdx.x, starts, experts, expert);
  if (place.rows <= 0) return;
  by_expert<P, N>(x, w, scales, expert, place, order, y, k, n_tiles);
}

// The same for few rows, each by blocks of its own: nothing needs to be grouped before.  Row i of
// y is row in_x[i] of x by the matrix of expert rhs[i].
template <typename P, int N>
__device__ void gathered_rows(const typename P::Number* x, const unsigned* w, const void* scales,
                              const unsigned* rhs, const unsigned* in_x, typename P::Number* y,
                              int k, int n_tiles) {
  const Place place{static_cast<int>(blockIdx.x), 1, 0};
  by_expert<P, N>(x, w, scales, rhs[blockIdx.x], place, {in_x, nullptr}, y, k, n_tiles);
}

}  // namespace tiled
}  // namespace qgraph
