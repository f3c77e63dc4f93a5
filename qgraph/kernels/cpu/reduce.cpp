// Reductions and cumulative operations.  Floats are added up in float32, stretch by stretch;
// integers in 64 bits.

#include "functions.hpp"
#include "walks.hpp"

namespace qgraph {
namespace {

constexpr long kRun = 256;  // elements read at a time

// NaN is passed on.
template <typename T>
T chosen(bool most, T a, T b) {
  if (a != a) return a;
  return (most ? b > a : b < a) || b != b ? b : a;
}

int64_t integer_of(int dtype, const char* from, long at) {
  return integer_at(dtype, from + at * size_of(dtype));
}

void write_integer(int dtype, char* to, int64_t x) {
  switch (size_of(dtype)) {
    case 1: *(uint8_t*)to = dtype == QG_BOOL ? x != 0 : (uint8_t)x; break;
    case 2: *(uint16_t*)to = (uint16_t)x; break;
    case 4: *(uint32_t*)to = (uint32_t)x; break;
    default: *(int64_t*)to = x;
  }
}

class Reduce : public Work {
 public:
  Reduce(const Table& table, const qg_reduce& args) : a(args) {
    if (a.outer_rank < 0 || a.inner_rank < 0 || a.outer_rank + a.inner_rank > QG_RANK)
      throw Mistake("it has %ld and %ld axes", (long)a.outer_rank, (long)a.inner_rank);
    int64_t shape[QG_RANK], strides[QG_RANK];
    for (long i = 0; i < a.outer_rank; i++) shape[i] = a.outer[i], strides[i] = a.x_outer[i];
    for (long i = 0; i < a.inner_rank; i++) {
      shape[a.outer_rank + i] = a.inner[i];
      strides[a.outer_rank + i] = a.x_inner[i];
    }
    table.holds("x", a.x, a.outer_rank + a.inner_rank, shape, strides);
    table.holds("y", a.y, a.outer_rank, a.outer, a.y_outer);
    count_ = product_of(a.outer_rank, a.outer);
    inner_ = product_of(a.inner_rank, a.inner);
    last_ = a.inner_rank ? a.inner[a.inner_rank - 1] : 1;
    step_ = a.inner_rank ? a.x_inner[a.inner_rank - 1] : 0;
    bool number = a.op == QG_ARGMAX || a.op == QG_ARGMIN, truth = a.op == QG_ALL || a.op == QG_ANY;
    bool real = a.op == QG_MEAN || a.op == QG_LOGSUMEXP || a.op == QG_VAR;
    if (a.op < QG_SUM || a.op > QG_VAR) throw Mistake("reduction %ld is none", (long)a.op);
    if (real) table.is_float("x", a.x);
    if (number) table.one_of("y", a.y, a.y.dtype == QG_U32, "uint32");
    if (truth) table.one_of("y", a.y, a.y.dtype == QG_BOOL, "bool");
    if (!number && !truth)
      table.one_of("y", a.y, is_float(a.x.dtype) == is_float(a.y.dtype), "of x's kind");
    if (inner_ == 0 && (number || a.op == QG_MAX || a.op == QG_MIN))
      throw Mistake("there is nothing to choose from");
  }

  long tasks(int, int threads) const override { return count_ ? over(count_, part(threads)) : 0; }

  void run(const Here& here, int, long task) const override {
    long begin = task * part(here.threads), end = begin + part(here.threads);
    for (long i = begin; i < end && i < count_; i++) {
      const char* x = here(a.x) + offset_of(i, a.outer_rank, a.outer, a.x_outer) * size_of(a.x.dtype);
      char* y = here(a.y) + offset_of(i, a.outer_rank, a.outer, a.y_outer) * size_of(a.y.dtype);
      if (a.op == QG_ALL || a.op == QG_ANY) truth(x, y);
      else if (is_float(a.x.dtype)) floats(x, y);
      else integers(x, y);
    }
  }

 private:
  long part(int threads) const { return part_of(count_, 32000 / (inner_ + 8) + 1, threads); }

  // Calls `f(values, count, number)` for stretches of the reduced elements as float32, in order.
  template <typename F>
  void stretches(const char* x, F f) const {
    float values[kRun];
    for (long done = 0; done < inner_; done += last_) {
      long at = offset_of(done, a.inner_rank, a.inner, a.x_inner);
      for (long i = 0; i < last_; i += kRun) {
        long some = last_ - i < kRun ? last_ - i : kRun;
        widen(a.x.dtype, x + (at + i * step_) * size_of(a.x.dtype), step_, values, some);
        f(values, some, done + i);
      }
    }
  }

  template <typename F>
  float total(const char* x, F f) const {
    double all = 0;  // thousands of stretches would lose digits in float32
    stretches(x, [&](const float* values, long count, long) {
      Floats own{};
      long i = 0;
      for (; i + kLanes <= count; i += kLanes) own += f(load<Floats>(values + i));
      if (i < count) {
        Floats rest = f(load_some<Floats>(values + i, count - i));
        for (long j = 0; j < count - i; j++) own[j] += rest[j];
      }
      all += sum(own);
    });
    return (float)all;
  }

  float extreme(const char* x, bool most, long* number = nullptr) const {
    float best = 0;
    bool first = true;
    stretches(x, [&](const float* values, long count, long at) {
      long i = 0;
      if (first) best = values[0], first = false;
      for (; i < count; i += kLanes) {  // most vectors hold nothing better
        if (i + kLanes <= count) {
          Floats v = load<Floats>(values + i);
          auto better = (most ? v > best : v < best) | (v != v);
          if (!any(better)) continue;
        }
        for (long j = i; j < i + kLanes && j < count; j++) {
          float next = chosen(most, best, values[j]);
          if (best == best && (next != best || next != next)) {
            best = next;
            if (number) *number = at + j;
          }
        }
      }
    });
    return best;
  }

  static bool any(Ints mask) {
    bool found = false;
    for (int i = 0; i < kLanes; i++) found |= mask[i] != 0;
    return found;
  }

  void floats(const char* x, char* y) const {
    float result = 0;
    long number = 0;
    switch (a.op) {
      case QG_SUM: result = total(x, [](Floats v) { return v; }); break;
      case QG_MEAN: result = total(x, [](Floats v) { return v; }) / inner_; break;
      case QG_PROD:
        result = 1;
        stretches(x, [&](const float* values, long count, long) {
          for (long i = 0; i < count; i++) result *= values[i];
        });
        break;
      case QG_MAX: result = extreme(x, true); break;
      case QG_MIN: result = extreme(x, false); break;
      case QG_ARGMAX: extreme(x, true, &number); break;
      case QG_ARGMIN: extreme(x, false, &number); break;
      case QG_LOGSUMEXP: {
        float high = inner_ ? extreme(x, true) : -INFINITY;
        float shift = std::isfinite(high) ? high : 0;
        result = total(x, [&](Floats v) { return exponential(v - shift); });
        result = std::isfinite(high) ? high + std::log(result) : high;
        break;
      }
      case QG_VAR: {
        float mean = total(x, [](Floats v) { return v; }) / inner_;
        result = total(x, [&](Floats v) { return (v - mean) * (v - mean); }) /
                 ((float)inner_ - (float)a.ddof);
      }
    }
    if (a.y.dtype == QG_U32) return write_integer(QG_U32, y, number);
    narrow(a.y.dtype, &result, y, 1, 1);
  }

  void integers(const char* x, char* y) const {
    uint64_t sum = 0, product = 1;
    int64_t best = 0;
    long number = 0;
    bool most = a.op == QG_MAX || a.op == QG_ARGMAX, is_u64 = a.x.dtype == QG_U64;
    for (long done = 0; done < inner_; done += last_) {
      long at = offset_of(done, a.inner_rank, a.inner, a.x_inner);
      for (long i = 0; i < last_; i++) {
        long from = at + i * step_;
        int64_t v = is_u64 ? load<int64_t>(x + 8 * from) : integer_of(a.x.dtype, x, from);
        sum += (uint64_t)v;
        product *= (uint64_t)v;
        bool better = is_u64 ? (most ? (uint64_t)v > (uint64_t)best : (uint64_t)v < (uint64_t)best)
                             : (most ? v > best : v < best);
        if (better || done + i == 0) best = v, number = done + i;
      }
    }
    int64_t results[] = {(int64_t)sum, 0, (int64_t)product, best, best, 0, 0, number, number, 0, 0};
    write_integer(a.y.dtype, y, results[a.op]);
  }

  void truth(const char* x, char* y) const {
    bool all = a.op == QG_ALL, result = all;
    if (is_float(a.x.dtype)) {
      stretches(x, [&](const float* values, long count, long) {
        for (long i = 0; i < count; i++) result = all ? result && values[i] != 0 : result || values[i] != 0;
      });
    } else {
      for (long done = 0; done < inner_ && result == all; done++) {
        long at = offset_of(done, a.inner_rank, a.inner, a.x_inner);
        bool one = integer_of(a.x.dtype, x, at) != 0;
        result = all ? result && one : result || one;
      }
    }
    *(uint8_t*)y = result;
  }

  const qg_reduce a;
  long count_, inner_, last_, step_;
};

class Scan : public RowWork {
 public:
  Scan(const Table& table, const qg_scan& args)
      : RowWork(table, args.rows, args.rows.length, args.rows.length), s(args) {
    bool fits = s.op == QG_SUM || s.op == QG_PROD || s.op == QG_MAX || s.op == QG_MIN;
    fits = fits || (s.op == QG_LOGSUMEXP && is_float(r.x.dtype));
    if (!fits || is_float(r.x.dtype) != is_float(r.y.dtype))
      throw Mistake("cumulative operation %ld from dtype %d to %d is none", (long)s.op, r.x.dtype,
                    r.y.dtype);
  }

 protected:
  long cost() const override { return 32; }

  void row(const Here&, long, const char* x, char* y) const override {
    if (is_float(r.x.dtype)) {
      double start = s.op == QG_PROD ? 1 : s.op == QG_SUM ? 0 : s.op == QG_MIN ? INFINITY : -INFINITY;
      run(start, [&](long i) {
        float v;
        widen(r.x.dtype, x + i * r.x_axis * size_of(r.x.dtype), 1, &v, 1);
        return (double)v;
      }, [&](long i, double v) {
        float result = (float)v;
        narrow(r.y.dtype, &result, y + i * r.y_axis * size_of(r.y.dtype), 1, 1);
      });
    } else {
      bool least = s.op == QG_MAX;
      int64_t start = s.op == QG_PROD ? 1 : s.op == QG_SUM ? 0 : extreme(least);
      run(start, [&](long i) { return integer_of(r.x.dtype, x, i * r.x_axis); },
          [&](long i, int64_t v) {
            write_integer(r.y.dtype, y + i * r.y_axis * size_of(r.y.dtype), v);
          });
    }
  }

 private:
  int64_t extreme(bool least) const {
    long bits = 8 * size_of(r.x.dtype);
    bool sign = r.x.dtype >= QG_I8 && r.x.dtype <= QG_I64;
    if (r.x.dtype == QG_BOOL) return !least;
    if (!sign) return least ? 0 : bits == 64 ? -1 : (int64_t)((1ull << bits) - 1);
    int64_t low = INT64_MIN >> (64 - bits);
    return least ? low : ~low;
  }

  template <typename T, typename Get, typename Put>
  void run(T so_far, Get get, Put put) const {
    for (long n = 0; n < r.length; n++) {
      long i = s.reverse ? r.length - 1 - n : n;
      T v = get(i);
      if (s.exclusive) put(i, so_far);
      so_far = joined(so_far, v);
      if (!s.exclusive) put(i, so_far);
    }
  }

  int64_t joined(int64_t a, int64_t b) const {
    if (s.op == QG_SUM) return (int64_t)((uint64_t)a + (uint64_t)b);
    if (s.op == QG_PROD) return (int64_t)((uint64_t)a * (uint64_t)b);
    return chosen(s.op == QG_MAX, a, b);
  }

  double joined(double a, double b) const {
    if (s.op == QG_SUM) return a + b;
    if (s.op == QG_PROD) return a * b;
    if (s.op != QG_LOGSUMEXP) return chosen(s.op == QG_MAX, a, b);
    double high = a > b ? a : b, low = a > b ? b : a;
    if (a != a || b != b) return NAN;
    return low == -INFINITY || high == INFINITY ? high : high + std::log1p(std::exp(low - high));
  }

  const qg_scan s;
};

}  // namespace

Maker make_reduce(const Table& table, long args) {
  return Maker(new Reduce(table, *table.args<qg_reduce>(args)));
}

Maker make_scan(const Table& table, long args) {
  return Maker(new Scan(table, *table.args<qg_scan>(args)));
}

}  // namespace qgraph
