// Attention of one query a head to the first keys of a cache, in float32.

#include "lanes.hpp"

#include <algorithm>
#include <cmath>
#include <memory>

namespace {

constexpr int kMostVectors = 256 / kLanes;  // of a head

// e^x for x <= 0, to 2e-7 of it: e^x = 2^n e^r with |r| <= ln(2) / 2, and e^r by its Taylor series.
Floats exponential(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  Floats whole = __builtin_convertvector(n, Floats);
  Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln(2) in two parts
  Floats y = Floats{} + 1.0f / 5040;
  for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    y = y * r + factor;
  return y * as_floats((n + 127) << 23);
}

struct Attention {
  const float *q, *k, *v;
  float* y;
  long heads, kv_heads, length, dim, seen;
  float scale;

  void head(long number) const {
    long own = number / heads * kv_heads + number % heads / (heads / kv_heads);
    const float *keys = k + own * length * dim, *values = v + own * length * dim;
    long padded = (seen + kLanes - 1) / kLanes * kLanes;
    std::unique_ptr<float[]> weights(new float[padded]);
    std::fill(weights.get() + seen, weights.get() + padded, -INFINITY);
    float largest = -INFINITY, all = 0;
    for (long i = 0; i < seen; i++) {
      float score = dot(q + number * dim, keys + i * dim) * scale;
      weights[i] = score;
      largest = std::max(largest, score);
      all += score;
    }
    float total = std::isfinite(all) ? soften(weights.get(), padded, largest)
                                     : soften_slowly(weights.get(), seen, largest);
    Floats sums[kMostVectors] = {};
    long vectors = dim / kLanes;
    for (long i = 0; i < seen; i++)
      for (long j = 0; j < vectors; j++)
        sums[j] += weights[i] * load<Floats>(values + i * dim + j * kLanes);
    for (long j = 0; j < vectors; j++) {
      Floats result = sums[j] / total;
      std::memcpy(y + number * dim + j * kLanes, &result, sizeof(result));
    }
  }

  float dot(const float* a, const float* b) const {
    Floats total{};
    for (long j = 0; j < dim; j += kLanes) total += load<Floats>(a + j) * load<Floats>(b + j);
    return sum(total);
  }

  static float soften(float* weights, long count, float largest) {
    Floats total{};
    for (long i = 0; i < count; i += kLanes) {
      Floats x = load<Floats>(weights + i) - largest;
      Floats w = x < -87.0f ? Floats{} : exponential(x);
      std::memcpy(weights + i, &w, sizeof(w));
      total += w;
    }
    return sum(total);
  }

  // With infinities or NaN among the scores, as the library has it.
  static float soften_slowly(float* weights, long count, float largest) {
    float total = 0;
    for (long i = 0; i < count; i++) total += weights[i] = std::exp(weights[i] - largest);
    return total;
  }
};

}  // namespace

// q (batch, heads, dim), k and v (batch, kv_heads, length, dim), y like q; keys from `seen` on are
// not read.  `dim` is a multiple of 16, at most 256.
extern "C" void qgraph_attend(ForEach for_each, const float* q, const float* k, const float* v,
                              float* y, long batch, long heads, long kv_heads, long length,
                              long dim, long seen, float scale, int threads) {
  Attention attention{q, k, v, y, heads, kv_heads, length, dim, seen, scale};
  long work = batch * heads * seen * dim;
  for_each([](void* a, long i) { ((const Attention*)a)->head(i); }, &attention, batch * heads,
           work < 20000 ? 1 : threads);
}
