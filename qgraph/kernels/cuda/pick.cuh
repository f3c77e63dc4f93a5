// The place of the greatest number of a row, found by all blocks of a grid.

namespace qgraph {
namespace phases {

// The greatest number so far, and its place: the first of several, 0 if no number is one.
struct Greatest {
  float number = -INFINITY;
  int place = 0;

  __device__ __forceinline__ void take(float v, int at) {
    if (v > number || (v == number && at < place)) number = v, place = at;
  }

  // Of all threads of a block, in all of them; `scratch` holds 2 WARPS numbers.
  __device__ void over_block(float* scratch) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      take(__shfl_sync(0xffffffff, number, lane ^ step), __shfl_sync(0xffffffff, place, lane ^ step));
    if (lane == 0) scratch[warp] = number, scratch[WARPS + warp] = __int_as_float(place);
    __syncthreads();
    for (int i = 0; i < WARPS; i++) take(scratch[i], __float_as_int(scratch[WARPS + i]));
    __syncthreads();
  }
};

// Puts the place of the greatest of WIDTH numbers to `to`: each block looks at some, and the last to
// have looked knows all.  `parts` holds two numbers of each block; the counter is 0 before and after.
template <int WIDTH, typename T, typename F>
__device__ void pick_greatest(const T* from, float* parts, unsigned* counter, float* scratch, F to) {
  constexpr int EIGHTS = WIDTH / 8;
  Greatest mine;
  for (int i = blockIdx.x + threadIdx.x * gridDim.x; i < EIGHTS; i += THREADS * gridDim.x) {
    const Eight some = load_8(from + i * 8);
#pragma unroll
    for (int e = 0; e < 8; e++) mine.take(some.v[e], i * 8 + e);
  }
  mine.over_block(scratch);
  float* own = parts + 2 * blockIdx.x;
  if (threadIdx.x == 0) {
    own[0] = mine.number, own[1] = __int_as_float(mine.place);
    scratch[0] = add_released(counter, 1) == gridDim.x - 1;
  }
  __syncthreads();
  const bool last = scratch[0] != 0;
  __syncthreads();
  if (!last) return;
  if (threadIdx.x == 0) *counter = 0;
  Greatest all;
  for (int i = threadIdx.x; i < gridDim.x; i += THREADS)
    all.take(load_shared(parts + 2 * i), __float_as_int(load_shared(parts + 2 * i + 1)));
  all.over_block(scratch);
  if (threadIdx.x == 0) to(all.place);
}

}  // namespace phases
}  // namespace qgraph
