// A router's numbers: each block computes them for itself, a row by a warp, in its shared memory.

namespace qgraph {
namespace phases {

// Calls to(i) for each place of a row, and waits until it is done.
template <int WIDTH, typename F>
__device__ __forceinline__ void along_row(F to) {
  for (int i = threadIdx.x % 32; i < WIDTH; i += 32) to(i);
  __syncwarp();
}

// The sum of f(i) over a row, in all lanes.
template <int WIDTH, typename F>
__device__ __forceinline__ float sum_of_row(F f) {
  float sum = 0;
  for (int i = threadIdx.x % 32; i < WIDTH; i += 32) sum += f(i);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  return sum;
}

template <typename T, int WIDTH>
__device__ void softmax_of_row(const float* from, float* to) {
  float most = -INFINITY;
  for (int i = threadIdx.x % 32; i < WIDTH; i += 32) most = greater(from[i], most);
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    most = greater(most, __shfl_xor_sync(0xffffffff, most, step));
  const float sum = sum_of_row<WIDTH>([&](int i) { return expf(from[i] - most); });
  along_row<WIDTH>([&](int i) { to[i] = rounded<T>(expf(from[i] - most) / sum); });
}

// The places of the COUNT last of a row's numbers in ascending order, or of the first.  Of equal ones the
// later is the greater; one that is no number is the least.
template <int WIDTH, int COUNT, bool LAST>
__device__ void select_of_row(const float* from, int* to) {
  constexpr int EACH = (WIDTH + 31) / 32;  // numbers of a lane
  static_assert(EACH <= 32);
  const int lane = threadIdx.x % 32;
  unsigned taken = 0;
  for (int turn = 0; turn < COUNT; turn++) {
    float best = -INFINITY;
    int place = -1;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int i = e * 32 + lane;
      if (i >= WIDTH || taken >> e & 1) continue;
      const float own = LAST ? from[i] : -from[i], v = own != own ? -INFINITY : own;
      if (place < 0 || v > best || (v == best && LAST)) best = v, place = i;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const float v = __shfl_xor_sync(0xffffffff, best, step);
      const int i = __shfl_xor_sync(0xffffffff, place, step);
      if (i >= 0 && (place < 0 || v > best || (v == best && (LAST ? i > place : i < place))))
        best = v, place = i;
    }
    if (place % 32 == lane) taken |= 1u << place / 32;
    if (lane == 0) to[LAST ? COUNT - 1 - turn : turn] = place;
  }
  __syncwarp();
}

}  // namespace phases
}  // namespace qgraph
