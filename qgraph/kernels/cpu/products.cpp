// What comes before and after the sums of a product: its matrices, and the rest of its arguments.

#include "products.hpp"

#include "functions.hpp"

namespace qgraph {
namespace {

  Floats floats_at(int dtype, const char* from, long at, long count) {
    long some = count - at < kLanes ? count - at : kLanes;
    if (some == kLanes && dtype == QG_F32) return load<Floats>(from + 4 * at);
    float few[kLanes] = {};
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

void Product::finish(const Here& here, const Matrices& at, long i, long rows, long j, float* sums,
                     float* sums2, long step, long count) const {
  int dtype = a.y.dtype;
  bool half = dtype != QG_F32, direct = !half && a.y_column == 1;
  long size = size_of(dtype);
  const char* biases = moved(here, a.bias, j);
  float alpha = (float)a.alpha;
  auto round = [&](Floats x) { return half ? rounded(dtype, x) : x; };
  auto place = [&](long r) { return at.y + ((i + r) * a.y_row + j * a.y_column) * size; };
  for (long c = 0; c < count; c += kLanes) {
    Floats bias = biases ? floats_at(a.bias.dtype, biases, c, count) : Floats{};
    for (long r = 0; r < rows; r++) {
      Floats x = load<Floats>(sums + r * step + c);
      if (!plain_) {
        if (alpha != 1) x = round(x * alpha);
        if (biases) x = round(x + bias);
        if (a.activation != QG_IDENTITY) x = activated(a.activation, round(x));
        if (sums2) x = round(x) * round(load<Floats>(sums2 + r * step + c));
        if (at.times)
          x = round(x) * floats_at(dtype, at.times + ((i + r) * a.times_row + j) * size, c, count);
        if (at.add)
          x = round(x) + floats_at(dtype, at.add + ((i + r) * a.add_row + j) * size, c, count);
      }
      if (direct && c + kLanes <= count) store(place(r) + c * 4, x);
      else store(sums + r * step + c, x);
    }
  }
  long done = direct ? count / kLanes * kLanes : 0;
  for (long r = 0; r < rows && done < count; r++)
    narrow(dtype, sums + r * step + done, place(r) + done * a.y_column * size, a.y_column,
           count - done);
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
