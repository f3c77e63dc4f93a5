// Rows of a weight in tiles (layout.py), as MLX packs them.

namespace qgraph {
namespace tiled {

// Rows of W as MLX packs them, and of its scales: 32 numbers a thread, a row a block along y.
template <Mode MODE, int BITS, int GROUP, typename S>
__device__ void take_rows(const unsigned* w, const void* scales, const int* rows, unsigned* w_rows,
                          S* s_rows, S* b_rows, int n, int k) {
  using B = Planes<BITS>;
  const int chunk = blockIdx.x * blockDim.x + threadIdx.x, tiles = (k + 63) / 64;
  const int words = k * BITS / 32, asked = rows[blockIdx.y], row = asked < 0 ? asked + n : asked;
  const int warp = row % 64 / 16, g = row % 16 / 2, r = row % 2;
  unsigned made[BITS] = {};
#pragma unroll
  for (int i = 0; i < 32; i++) {
    const int column = chunk * 32 + i;
    if (column >= k) break;
    const unsigned* own = w + (size_t(row / 64) * tiles + column / 64) * 128 * BITS +
                          warp * 32 * BITS;
    const int lane = 4 * g + column % 8 / 2, half = column % 2;
    const int place = column % 64 / 16 * 4 + column % 16 / 8 * 2 + r;
    const unsigned q = number_of<B::first>(own, lane, place, half) |
                       number_of<B::second>(own + 32 * B::first, lane, place, half) << B::first;
    made[i * BITS / 32] |= q << i * BITS % 32;
    if (i * BITS % 32 + BITS > 32) made[i * BITS / 32 + 1] |= q >> (32 - i * BITS % 32);
  }
#pragma unroll
  for (int i = 0; i < BITS; i++)
    if (chunk * BITS + i < words) w_rows[size_t(blockIdx.y) * words + chunk * BITS + i] = made[i];
  for (int group = chunk; group < k / GROUP; group += gridDim.x * blockDim.x) {
    const size_t from = (size_t(row / 64) * (tiles * 64 / GROUP) + group) * 64 + row % 64;
    const size_t to = size_t(blockIdx.y) * (k / GROUP) + group;
    if constexpr (MODE == AFFINE) {
      s_rows[to] = static_cast<const S*>(scales)[2 * from];
      b_rows[to] = static_cast<const S*>(scales)[2 * from + 1];
    } else {
      s_rows[to] = static_cast<const S*>(scales)[from];
    }
  }
}

}  // namespace tiled
}  // namespace qgraph
