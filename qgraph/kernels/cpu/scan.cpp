// Cumulative operations.  What runs on is kept in double, integers in 64 bits.
//
// Along rows whose elements lie side by side a vector is joined within itself and with what came
// before; where rows lie side by side, each has a lane of its own.

#pragma GCC optimize("O3")  // loops over lanes become vectors

#include <algorithm>
#include <cmath>

#include "elements.hpp"
#include "walks.hpp"

namespace qgraph {
namespace {

constexpr long kRun = 256;  // elements at a time

constexpr int kHalf = kLanes / 2;
using Doubles = double __attribute__((vector_size(4 * kLanes)));
using Longs = int64_t __attribute__((vector_size(4 * kLanes)));
using HalfFloats = float __attribute__((vector_size(2 * kLanes)));

// The lane `step` before each; the first ones have `start`.
template <int step, int... i>
Doubles later(Doubles v, Doubles start, std::integer_sequence<int, i...>) {
  return __builtin_shuffle(start, v, Longs{(i < step ? i : kHalf + i - step)...});
}

template <int step, typename F>
Doubles joined(Doubles v, Doubles start, F join) {
  return join(later<step>(v, start, std::make_integer_sequence<int, kHalf>()), v);
}

// Each lane joined with those before it.
template <typename F>
Doubles prefix(Doubles v, Doubles start, F join) {
  v = joined<1>(v, start, join);
  if constexpr (kHalf > 2) v = joined<2>(v, start, join);
  if constexpr (kHalf > 4) v = joined<4>(v, start, join);
  return v;
}

class Scan : public Work {
 public:
  Scan(const Table& table, const qg_scan& args) : s(args), r(args.rows) {
    bool fits = s.op == QG_SUM || s.op == QG_PROD || s.op == QG_MAX || s.op == QG_MIN;
    fits = fits || (s.op == QG_LOGSUMEXP && is_float(r.x.dtype));
    if (!fits || is_float(r.x.dtype) != is_float(r.y.dtype))
      throw Mistake("cumulative operation %ld from dtype %d to %d is none", (long)s.op, r.x.dtype,
                    r.y.dtype);
    if (r.rank < 0 || r.rank >= QG_RANK) throw Mistake("it has %ld axes of rows", (long)r.rank);
    if (r.length < 0) throw Mistake("rows of %ld", (long)r.length);
    for (const auto& [name, ref, strides, axis] :
         {Side{"x", r.x, r.x_strides, r.x_axis}, Side{"y", r.y, r.y_strides, r.y_axis}}) {
      int64_t shape[QG_RANK], all[QG_RANK];
      std::copy(r.shape, r.shape + r.rank, shape);
      std::copy(strides, strides + r.rank, all);
      shape[r.rank] = r.length, all[r.rank] = axis;
      table.holds(name, ref, r.rank + 1, shape, all);
    }
    rank_ = r.rank;
    if (rank_ && r.shape[rank_ - 1] >= 8 && std::abs(r.x_strides[rank_ - 1]) < std::abs(r.x_axis))
      rank_--, width_ = r.shape[rank_], side_ = r.x_strides[rank_], y_side_ = r.y_strides[rank_];
    runs_ = over(width_, kRun);
    rows_ = r.length ? product_of(rank_, r.shape) : 0;
  }

  long tasks(int, int threads) const override {
    return rows_ * runs_ > 0 ? over(rows_ * runs_, part(threads)) : 0;
  }

  void run(const Here& here, int, long task) const override {
    long begin = task * part(here.threads), end = begin + part(here.threads);
    long x_size = size_of(r.x.dtype), y_size = size_of(r.y.dtype);
    long last = s.reverse ? r.length - 1 : 0, turn = s.reverse ? -1 : 1;
    for (long i = begin; i < end && i < rows_ * runs_; i++) {
      long row = i / runs_, first = i % runs_ * kRun, count = std::min(width_ - first, kRun);
      const char* x = here(r.x) + (offset_of(row, rank_, r.shape, r.x_strides) + first * side_ + last * r.x_axis) * x_size;
      char* y = here(r.y) + (offset_of(row, rank_, r.shape, r.y_strides) + first * y_side_ + last * r.y_axis) * y_size;
      Walk walk{x, y, turn * r.x_axis, turn * r.y_axis};
      if (!is_float(r.x.dtype)) integers(walk, count);
      else if (side_ || s.op == QG_LOGSUMEXP) across(walk, count);
      else along(walk);
    }
  }

 private:
  struct Side {
    const char* name;
    qg_ref ref;
    const int64_t* strides;
    int64_t axis;
  };

  // First elements, and the way to the next.
  struct Walk {
    const char* x;
    char* y;
    long x_step, y_step;
  };

  long part(int threads) const {
    return part_of(rows_ * runs_, 32000 / (r.length * std::min(width_, kRun) + 8) + 1, threads);
  }

  // ---- Along ------------------------------------------------------------------------------------

  void along(const Walk& w) const {
    switch (s.op) {
      case QG_SUM:
        return along(w, 0.0, [](auto a, auto b) { return a + b; });
      case QG_PROD:
        return along(w, 1.0, [](auto a, auto b) { return a * b; });
      case QG_MAX:
        return along(w, -INFINITY, [](auto a, auto b) { return (a >= b) | (a != a) ? a : b; });
      default:
        return along(w, INFINITY, [](auto a, auto b) { return (a <= b) | (a != a) ? a : b; });
    }
  }

  template <typename F>
  void along(const Walk& w, double start, F join) const {
    float values[kRun], results[kRun + 1];
    Doubles none = start - Doubles{}, so_far = none;
    for (long at = 0; at < r.length; at += kRun) {
      long count = std::min(r.length - at, kRun);
      widen(r.x.dtype, w.x + at * w.x_step * size_of(r.x.dtype), w.x_step, values, count);
      for (long i = count; i < up(count, kHalf); i++) values[i] = (float)start;
      results[0] = (float)so_far[0];
      for (long i = 0; i < count; i += kHalf) {
        Doubles own = __builtin_convertvector(load<HalfFloats>(values + i), Doubles);
        own = join(so_far, prefix(own, none, join));
        store(results + i + 1, __builtin_convertvector(own, HalfFloats));
        so_far = own[kHalf - 1] - Doubles{};
      }
      narrow(r.y.dtype, results + !s.exclusive, w.y + at * w.y_step * size_of(r.y.dtype), w.y_step,
             count);
    }
  }

  // ---- Across -----------------------------------------------------------------------------------

  void across(const Walk& w, long count) const {
    switch (s.op) {
      case QG_SUM:
        return across(w, count, 0, [](double a, double b) { return a + b; });
      case QG_PROD:
        return across(w, count, 1, [](double a, double b) { return a * b; });
      case QG_MAX:
        return across(w, count, -INFINITY, [](double a, double b) { return a >= b || a != a ? a : b; });
      case QG_MIN:
        return across(w, count, INFINITY, [](double a, double b) { return a <= b || a != a ? a : b; });
      default:
        return across(w, count, -INFINITY, log_add_exp);
    }
  }

  static double log_add_exp(double a, double b) {
    double high = a > b ? a : b, low = a > b ? b : a;
    if (a != a || b != b) return NAN;
    return low == -INFINITY || high == INFINITY ? high : high + std::log1p(std::exp(low - high));
  }

  template <typename F>
  void across(const Walk& w, long count, double start, F join) const {
    float values[kRun];
    double so_far[kRun];
    std::fill(so_far, so_far + count, start);
    const char* x = w.x;
    char* y = w.y;
    for (long n = 0; n < r.length; n++) {
      widen(r.x.dtype, x, side_, values, count);
      for (long j = 0; j < count; j++) {
        double next = join(so_far[j], (double)values[j]);
        values[j] = (float)(s.exclusive ? so_far[j] : next);
        so_far[j] = next;
      }
      narrow(r.y.dtype, values, y, y_side_, count);
      x += w.x_step * size_of(r.x.dtype), y += w.y_step * size_of(r.y.dtype);
    }
  }

  // ---- Integers ---------------------------------------------------------------------------------

  void integers(const Walk& w, long count) const {
    switch (s.op) {
      case QG_SUM:
        return integers(w, count, 0, [](int64_t a, int64_t b) { return (int64_t)((uint64_t)a + (uint64_t)b); });
      case QG_PROD:
        return integers(w, count, 1, [](int64_t a, int64_t b) { return (int64_t)((uint64_t)a * (uint64_t)b); });
      case QG_MAX:
        return integers(w, count, extreme(true), [](int64_t a, int64_t b) { return a > b ? a : b; });
      default:
        return integers(w, count, extreme(false), [](int64_t a, int64_t b) { return a < b ? a : b; });
    }
  }

  template <typename F>
  void integers(const Walk& w, long count, int64_t start, F join) const {
    int64_t values[kRun], so_far[kRun];
    bool ordered = s.op == QG_MAX || s.op == QG_MIN;
    std::fill(so_far, so_far + count, start);
    const char* x = w.x;
    char* y = w.y;
    for (long n = 0; n < r.length; n++) {
      read_integers(r.x.dtype, x, side_, values, count);
      if (ordered) turn_sign(r.x.dtype, values, count);
      for (long j = 0; j < count; j++) {
        int64_t next = join(so_far[j], values[j]);
        values[j] = s.exclusive ? so_far[j] : next;
        so_far[j] = next;
      }
      if (ordered) turn_sign(r.x.dtype, values, count);
      write_integers(r.y.dtype, values, y, y_side_, count);
      x += w.x_step * size_of(r.x.dtype), y += w.y_step * size_of(r.y.dtype);
    }
  }

  // The least number of x's dtype, or the greatest, in the order that is compared in.
  int64_t extreme(bool least) const {
    long bits = 8 * size_of(r.x.dtype);
    bool sign = r.x.dtype >= QG_I8 && r.x.dtype <= QG_I64;
    if (r.x.dtype == QG_BOOL) return !least;
    if (bits == 64) return least ? INT64_MIN : INT64_MAX;
    if (!sign) return least ? 0 : (int64_t)((1ull << bits) - 1);
    int64_t low = INT64_MIN >> (64 - bits);
    return least ? low : ~low;
  }

  const qg_scan s;
  const qg_rows r;
  long rank_, width_ = 1, runs_, rows_;
  long side_ = 0, y_side_ = 1;  // from row to row where those lie side by side
};

}  // namespace

Maker make_scan(const Table& table, long args) {
  return Maker(new Scan(table, *table.args<qg_scan>(args)));
}

}  // namespace qgraph
