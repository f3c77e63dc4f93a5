// A residual that is added, and the RMS norm of the sum, in one launch: apart, the norm would read all
// rows again that the sum had just written.

namespace qgraph {
namespace phases {

// sum = h + x, and norm, of the row that is this block's: N numbers, of which each thread of the WIDE
// warps has up to CHUNKS times 16 bytes.  `scratch` has room for a number of each warp.
template <typename T, int N, int CHUNKS, int WIDE>
__device__ void add_norm(const T* x, const T* h, const T* weight, T* sum, T* norm, float eps,
                         float* scratch) {
  using Some = Sixteen<T>;
  constexpr int V = Some::COUNT;
  const bool are_aligned = (reinterpret_cast<size_t>(x) | reinterpret_cast<size_t>(h) |
                            reinterpret_cast<size_t>(weight)) % 16 == 0;
  const size_t row = size_t(blockIdx.x) * N;
  const auto column = [](int c) { return (c * 32 * WIDE + int(threadIdx.x)) * V; };
  Some found[CHUNKS];
  float squares = 0;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    if (column(c) >= N) continue;
    const size_t i = row + column(c);
    const Some one(load_16(x + i, are_aligned)), residual(load_16(h + i, are_aligned));
#pragma unroll
    for (int e = 0; e < V; e++) {
      const float v = found[c].v[e] = rounded<T>(residual.v[e] + one.v[e]);
      squares += v * v;
    }
    found[c].store(sum + i);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(0xffffffff, squares, step);
  if constexpr (WIDE > 1) {
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0;
#pragma unroll
    for (int i = 0; i < WIDE; i++) squares += scratch[i];
  }
  const float scale = rsqrtf(squares / N + eps);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    if (column(c) >= N) continue;
    const Some w(load_16(weight + column(c), are_aligned));
#pragma unroll
    for (int e = 0; e < V; e++) found[c].v[e] = w.v[e] * rounded<T>(found[c].v[e] * scale);
    found[c].store(norm + row + column(c));
  }
}

}  // namespace phases
}  // namespace qgraph
