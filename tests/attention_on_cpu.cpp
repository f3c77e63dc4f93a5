// `decode_attention.cuh` for float32 heads of 64 by a CPU: see cuda_on_cpu.hpp.

#include "cuda_on_cpu.hpp"
#include SOURCE

namespace {

constexpr int kDim = 64, kEighth = 0x3e000000, kOne = 0x3f800000;  // 0.125 and 1 as float32
constexpr int kBase = 0x41549a78;                                  // log2(10000)

struct Given {
  const float *q, *k, *v, *keys, *values, *freqs;
  const int *place, *last;
  float *y, *parts, *new_keys, *new_values;
  int heads, kv_heads, length;
} given;

template <int SPLITS, int DIMS, bool TRADITIONAL>
void cached() {
  constexpr int WARPS = SPLITS == 1 ? 16 : 8;
  qgraph::cached_attention<float, kDim, WARPS, SPLITS, kEighth, DIMS, TRADITIONAL, kBase, kOne>(
      given.q, given.heads * kDim, given.k, given.kv_heads * kDim, given.v, given.kv_heads * kDim,
      given.keys, given.values, given.place, given.last, given.freqs,
      SPLITS == 1 ? given.y : given.parts, given.new_keys, given.new_values, given.heads,
      given.kv_heads, given.length);
}

template <int SPLITS>
void joined() {
  qgraph::join_splits<float, kDim, SPLITS>(given.parts, given.y);
}

template <int SPLITS>
bool run(int heads, int dims, bool traditional) {
  auto what = dims == 0 ? cached<SPLITS, 0, false>
      : traditional     ? cached<SPLITS, 32, true>
                        : cached<SPLITS, kDim, false>;
  if (!launch(what, heads * SPLITS, SPLITS == 1 ? 512 : 256)) return false;
  if constexpr (SPLITS > 1) return launch(joined<SPLITS>, heads, kDim);
  return true;
}

}  // namespace

// dims: 0, 32 if traditional, else 64.
extern "C" bool attention(Given what, int batch, int splits, int dims, bool traditional) {
  given = what;
  const int heads = batch * given.heads;
  return splits == 1 ? run<1>(heads, dims, traditional) : run<5>(heads, dims, traditional);
}
