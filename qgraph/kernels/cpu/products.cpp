// What comes before and after the sums of a product: its matrices, and the rest of its arguments.

#include "products.hpp"

#include "functions.hpp"

namespace qgraph {
namespace {

  Floats floats_at(int dtype, const char* from, long at, long count) {
    float few[kLanes] = {};
    long some = count - at < kLanes ? count - at : kLanes;
    if (some == kLanes && dtype == QG_F32) return load<Floats>(from + 4 * at);
    widen(dtype, from + at * size_of(dtype), 1, few, some);
    return load<Floats>(few);
  }

  Floats activated(long kind, Floats x) {
    switch (kind) {
      case QG_SILU: return silu(x);
      case QG_GELU: return gelu(x);
      case QG_GELU_TANH: return gelu_tanh(x);
      case QG_RELU: return larger(x, Floats{});
      case QG_SIGMOID: return sigmoid(x);
      default: return tangent_h(x);
    }
  }

}  // namespace

Matrices Product::matrices(const Here& here, long entry) const {
  long x = 0, w = 0, y = 0, times = 0, add = 0, left = entry;
  for (long i = a.batch_rank - 1; i >= 0; i--) {
    long at = left % a.batch[i];
    left /= a.batch[i];
    x += at * a.x_batch[i], w += at * a.w_batch[i], y += at * a.y_batch[i];
    times += at * a.times_batch[i], add += at * a.add_batch[i];
  }
  if (given(a.lhs)) x += a.x_stack * number(here, a.lhs, entry, a.x_matrices);
  if (given(a.rhs)) w += a.w_stack * number(here, a.rhs, entry, a.w_matrices);
  return {moved(here, a.x, x), weight(here, a.w, w), weight(here, a.w2, w),
          moved(here, a.y, y), moved(here, a.times, times), moved(here, a.add, add)};
}


void Product::finish(const Here& here, const Matrices& at, long i, long j, float* sums, float* sums2,
                     long count) const {
  if (plain_) {  // the sums are all
    std::memcpy(at.y + (i * a.y_row + j) * 4, sums, count * sizeof(float));
    return;
  }
  int dtype = a.y.dtype;
  bool half = dtype != QG_F32;
  auto each = [&](float* values, auto f) {
    for (long c = 0; c < count; c += kLanes) {
      Floats x = f(load<Floats>(values + c), c);
      store(values + c, half ? rounded(dtype, x) : x);
    }
  };
  if (a.alpha != 1) each(sums, [&](Floats x, long) { return x * (float)a.alpha; });
  if (given(a.bias)) {
    const char* bias = here(a.bias) + j * size_of(a.bias.dtype);
    each(sums, [&](Floats x, long c) {
      return x + floats_at(a.bias.dtype, bias, c, count);
    });
  }
  if (a.activation != QG_IDENTITY)
    each(sums, [&](Floats x, long) {
      return activated(a.activation, half ? rounded(dtype, x) : x);
    });
  if (sums2) {
    if (half) each(sums2, [](Floats x, long) { return x; });
    each(sums, [&](Floats x, long c) { return x * load<Floats>(sums2 + c); });
  }
  if (at.times) {
    const char* times = at.times + (i * a.times_row + j) * size_of(a.times.dtype);
    if (half) each(sums, [](Floats x, long) { return x; });
    each(sums, [&](Floats x, long c) { return x * floats_at(dtype, times, c, count); });
  }
  if (at.add) {
    const char* add = at.add + (i * a.add_row + j) * size_of(a.add.dtype);
    if (half) each(sums, [](Floats x, long) { return x; });
    each(sums, [&](Floats x, long c) { return x + floats_at(dtype, add, c, count); });
  }
  narrow(dtype, sums, at.y + (i * a.y_row + j * a.y_column) * size_of(dtype), a.y_column, count);
}

void group_scales(const qg_matmul& a, const Matrices::Weight& w, const qg_weight& refs, long first,
                  long count, float centre, float* scales, float* biases) {
  of_scale(a.mode, refs.scales.dtype, [&](auto kind) {
    using D = decltype(kind);
    using Stored = typename D::Stored;
    for (long g = 0; g < count; g += kLanes) {
      Floats scale = load_part<D>((const Stored*)w.scales + first + g, count - g, w.scales_end);
      store(scales + g, scale);
      if (!w.biases) continue;
      const char* end = w.biases + (w.scales_end - w.scales);
      Floats bias = load_part<D>((const Stored*)w.biases + first + g, count - g, end);
      store(biases + g, bias + centre * scale);
    }
  });
}

}  // namespace qgraph
