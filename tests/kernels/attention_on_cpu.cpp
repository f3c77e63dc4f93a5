// The sources of attention by a CPU.

#include "attention_on_cpu.hpp"

#include "attention.cuh"

namespace {

using namespace qgraph;

struct Given {
  const void *q, *keys, *values, *mask, *sinks, *k, *v, *tail_keys, *tail_values;
  const int *last, *first, *place, *tail_positions;
  const float* freqs;
  float* parts;
  void *y, *new_keys, *new_values;
  int* new_positions;
  const int* offset;
  int batch, heads, kv_heads, queries, length, splits, window, last_step, first_step, dims,
      traditional;
  long long mask_batch, mask_head, mask_query, mask_key;
  float scale, base, rope_scale;
} given;

template <class F>
Call<typename F::S> call() {
  using S = typename F::S;
  const int rows = given.heads * given.queries;
  return {static_cast<const S*>(given.q), rows * F::D, given.queries * F::D, F::D,
          static_cast<const S*>(given.keys), static_cast<const S*>(given.values), given.heads,
          given.kv_heads, given.queries, given.length, given.splits, given.scale, given.last,
          given.first, given.last_step, given.first_step, given.window, given.mask,
          given.mask_batch, given.mask_head, given.mask_query, given.mask_key,
          static_cast<const S*>(given.sinks), given.parts, static_cast<typename F::S*>(given.y)};
}

template <class F>
void decode() {
  static Shared<F> shared;
  decode_attention<F>(call<F>(), blockIdx.x, shared);
}

template <class F>
void cached() {
  using S = typename F::S;
  static Shared<F> shared;
  const Token<S> token{
      static_cast<const S*>(given.k), static_cast<const S*>(given.v), given.kv_heads * F::D,
      given.kv_heads * F::D, given.place,
      {given.dims, bool(given.traditional), given.base, given.rope_scale, given.freqs},
      static_cast<const S*>(given.tail_keys), static_cast<const S*>(given.tail_values),
      given.tail_positions, static_cast<S*>(given.new_keys), static_cast<S*>(given.new_values),
      given.new_positions, given.offset};
  cached_attention<F>(call<F>(), token, blockIdx.x, shared);
}

template <class F, bool CACHED>
bool run() {
  const int rows = given.heads / given.kv_heads * given.queries;
  const int tasks =
      given.batch * given.kv_heads * ((rows + F::ROWS - 1) / F::ROWS) * given.splits;
  std::memset(given.y, 0xff, sizeof(typename F::S) * given.batch * given.heads * given.queries * F::DV);
  if (!launch(CACHED ? cached<F> : decode<F>, tasks, F::THREADS)) return false;
  return given.splits == 1 ||
         launch(
             [] {
               static float room[64];
               join<F::DV>(call<F>(), blockIdx.x, room);
             },
             given.batch * given.heads * given.queries, F::DV);
}

using B = __nv_bfloat16;
using H = __half;
bool (*kernels[])() = {
    run<Form<B, 64, 64, 1, 2>, false>,
#ifdef FIRST_AND_LAST
    0, 0, 0, 0, 0, 0, 0, 0, 0,
#else
    run<Form<H, 128, 128, 2, 2>, false>,
    run<Form<float, 64, 64, 1, 2>, false>,
    run<Form<B, 192, 128, 1, 4>, false>,
    run<Form<B, 64, 64, 1, 2, 0, bool>, false>,
    run<Form<H, 64, 64, 1, 2, 0, H>, false>,
    run<Form<H, 64, 64, 1, 2, 0, float>, false>,
    run<Form<B, 64, 64, 1, 2, 1>, true>,
    run<Form<float, 64, 64, 1, 2, 1>, true>,
    run<Form<H, 128, 128, 1, 2, 8>, true>,
#endif
    run<Form<float, 64, 64, 1, 2, 20>, true>,
};

}  // namespace

extern "C" bool attention(Given what, int which) {
  given = what;
  return kernels[which]();
}

extern "C" bool merge(Given what) {
  given = what;
  return launch(
      [] {
        merge_tail<float, 64, 20, 64>(
            static_cast<const float*>(given.keys), static_cast<const float*>(given.tail_keys),
            given.tail_positions, static_cast<float*>(given.new_keys),
            given.batch * given.kv_heads, given.length);
      },
      3, 64);
}
