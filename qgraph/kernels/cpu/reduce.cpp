// Reductions.  Floats are added up in float32, stretch by stretch; integers in 64 bits.
//
// Where what is reduced lies side by side, each result is the work of many lanes; where results lie
// side by side, each has a lane of its own and rows are read as they come.

#pragma GCC optimize("O3")  // loops over lanes become vectors

#include <algorithm>

#include "elements.hpp"
#include "functions.hpp"
#include "walks.hpp"

namespace qgraph {
namespace {

constexpr long kRun = 512;      // elements read at a time
constexpr long kFlushed = 64;   // rows after which float32 sums go to double: digits would be lost

// NaN is passed on.
template <typename T>
T chosen(bool most, T a, T b) {
  if (a != a) return a;
  return (most ? b > a : b < a) || b != b ? b : a;
}

Floats chosen(bool most, Floats a, Floats b) {
  Ints better = (most ? b > a : b < a) | (b != b);
  return (better & (a == a)) != 0 ? b : a;
}

bool any(Ints mask) {
  bool found = false;
  for (int i = 0; i < kLanes; i++) found |= mask[i] != 0;
  return found;
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
    bool real = a.op == QG_MEAN || a.op == QG_LOGSUMEXP || a.op == QG_VAR;
    if (a.op < QG_SUM || a.op > QG_VAR) throw Mistake("reduction %ld is none", (long)a.op);
    if (real) table.is_float("x", a.x);
    if (number()) table.one_of("y", a.y, a.y.dtype == QG_U32, "uint32");
    if (truth()) table.one_of("y", a.y, a.y.dtype == QG_BOOL, "bool");
    if (!number() && !truth())
      table.one_of("y", a.y, is_float(a.x.dtype) == is_float(a.y.dtype), "of x's kind");
    inner_ = product_of(a.inner_rank, a.inner);
    if (inner_ == 0 && (number() || a.op == QG_MAX || a.op == QG_MIN))
      throw Mistake("there is nothing to choose from");
    last_ = a.inner_rank ? a.inner[a.inner_rank - 1] : 1;
    step_ = a.inner_rank ? a.x_inner[a.inner_rank - 1] : 0;
    if (a.outer_rank) {
      long side = a.x_outer[a.outer_rank - 1];
      if (a.outer[a.outer_rank - 1] >= 8 && std::abs(side) < std::abs(step_)) side_ = side;
    }
    width_ = side_ ? a.outer[a.outer_rank - 1] : 1;
    y_side_ = side_ ? a.y_outer[a.outer_rank - 1] : 1;
    rows_ = product_of(a.outer_rank - (side_ != 0), a.outer);
    runs_ = over(width_, kRun);
  }

  long tasks(int, int threads) const override {
    long all = rows_ * runs_;
    return all ? over(all, part(threads)) : 0;
  }

  void run(const Here& here, int, long task) const override {
    long begin = task * part(here.threads), end = begin + part(here.threads);
    long rank = a.outer_rank - (side_ != 0);
    for (long i = begin; i < end && i < rows_ * runs_; i++) {
      long row = i / runs_, first = i % runs_ * kRun, count = std::min(width_ - first, kRun);
      const char* x = here(a.x) + (offset_of(row, rank, a.outer, a.x_outer) + first * side_) * x_size();
      char* y = here(a.y) + (offset_of(row, rank, a.outer, a.y_outer) + first * y_side_) * size_of(a.y.dtype);
      if (is_float(a.x.dtype)) side_ ? floats_across(x, y, count) : floats_along(x, y);
      else side_ ? integers_across(x, y, count) : integers_along(x, y);
    }
  }

 private:
  bool number() const { return a.op == QG_ARGMAX || a.op == QG_ARGMIN; }
  bool truth() const { return a.op == QG_ALL || a.op == QG_ANY; }
  bool most() const { return a.op == QG_MAX || a.op == QG_ARGMAX; }
  long x_size() const { return size_of(a.x.dtype); }

  long part(int threads) const {
    return part_of(rows_ * runs_, 32000 / (inner_ * std::min(width_, kRun) + 8) + 1, threads);
  }

  // Calls `f(first, step, count, number)` for the runs of what is reduced.
  template <typename F>
  void runs(const char* x, F f) const {
    for (long done = 0; done < inner_; done += last_)
      f(x + offset_of(done, a.inner_rank, a.inner, a.x_inner) * x_size(), done);
  }

  // ---- Along: one result ------------------------------------------------------------------------

  // Calls `f(values, count, number)` for stretches of the reduced elements as float32, in order.
  template <typename F>
  void stretches(const char* x, F f) const {
    float values[kRun];
    runs(x, [&](const char* from, long done) {
      for (long i = 0; i < last_; i += kRun) {
        long some = std::min(last_ - i, kRun);
        const char* first = from + i * step_ * x_size();
        if (a.x.dtype == QG_F32 && step_ == 1) {
          f((const float*)first, some, done + i);
        } else {
          widen(a.x.dtype, first, step_, values, some);
          f((const float*)values, some, done + i);
        }
      }
    });
  }

  template <typename F>
  float total(const char* x, F f) const {
    double all = 0;  // thousands of stretches would lose digits in float32
    stretches(x, [&](const float* values, long count, long) {
      Floats sums[4] = {};
      long i = 0;
      for (; i + 4 * kLanes <= count; i += 4 * kLanes)
        for (int j = 0; j < 4; j++) sums[j] += f(load<Floats>(values + i + j * kLanes));
      for (; i + kLanes <= count; i += kLanes) sums[0] += f(load<Floats>(values + i));
      if (i < count) {
        Floats rest = f(load_some<Floats>(values + i, count - i));
        for (long j = 0; j < count - i; j++) sums[0][j] += rest[j];
      }
      all += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    });
    return (float)all;
  }

  float extreme(const char* x, bool most, uint32_t* number = nullptr) const {
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
            if (number) *number = (uint32_t)(at + j);
          }
        }
      }
    });
    return best;
  }

  void floats_along(const char* x, char* y) const {
    float result = 0;
    uint32_t number = 0;
    switch (a.op) {
      case QG_SUM: result = total(x, [](Floats v) { return v; }); break;
      case QG_MEAN: result = total(x, [](Floats v) { return v; }) / inner_; break;
      case QG_PROD:
        result = 1;
        stretches(x, [&](const float* values, long count, long) {
          for (long i = 0; i < count; i++) result *= values[i];
        });
        break;
      case QG_MAX: case QG_MIN: result = extreme(x, most()); break;
      case QG_ARGMAX: case QG_ARGMIN:
        extreme(x, most(), &number);
        std::memcpy(y, &number, sizeof(number));
        return;
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
        break;
      }
      default: {
        bool all = a.op == QG_ALL, found = all;
        stretches(x, [&](const float* values, long count, long) {
          for (long i = 0; i < count; i++) found = all ? found & (values[i] != 0) : found | (values[i] != 0);
        });
        *(uint8_t*)y = found;
        return;
      }
    }
    narrow(a.y.dtype, &result, y, 1, 1);
  }

  void integers_along(const char* x, char* y) const {
    int64_t values[kRun], result = start();
    uint32_t number = 0;
    runs(x, [&](const char* from, long done) {
      for (long i = 0; i < last_; i += kRun) {
        long some = std::min(last_ - i, kRun);
        read_integers(a.x.dtype, from + i * step_ * x_size(), step_, values, some);
        if (chooses()) turn_sign(a.x.dtype, values, some);
        if (this->number() && done + i == 0) result = values[0];
        of_integers([&](auto join) {
          int64_t so_far = result;
          for (long j = 0; j < some; j++) {
            int64_t next = join(so_far, values[j]);
            if (this->number() && next != so_far) number = (uint32_t)(done + i + j);
            so_far = next;
          }
          result = so_far;
        });
      }
    });
    if (this->number()) return (void)std::memcpy(y, &number, sizeof(number));
    if (chooses()) turn_sign(a.x.dtype, &result, 1);
    write_integers(a.y.dtype, &result, y, 1, 1);
  }

  // ---- Across: results side by side -------------------------------------------------------------

  // Calls `f(values, number)` for each row of `count` elements, padded to whole vectors.
  template <typename F>
  void rows(const char* x, long count, F f) const {
    float values[kRun] = {};
    bool direct = a.x.dtype == QG_F32 && side_ == 1 && count % kLanes == 0;
    runs(x, [&](const char* from, long done) {
      for (long i = 0; i < last_; i++, from += step_ * x_size()) {
        if (direct) {
          f((const float*)from, done + i);
        } else {
          widen(a.x.dtype, from, side_, values, count);
          f((const float*)values, done + i);
        }
      }
    });
  }

  // to = join(to, row) for all rows.
  template <typename F>
  void fold(const char* x, float* to, long count, F join) const {
    rows(x, count, [&](const float* values, long) {
      for (long j = 0; j < count; j += kLanes)
        store(to + j, join(load<Floats>(to + j), load<Floats>(values + j)));
    });
  }

  // Sums of f(element, lane).
  template <typename F>
  void totals(const char* x, float* to, long count, F f) const {
    double all[kRun] = {};
    float sums[kRun] = {};
    auto flush = [&] {
      for (long j = 0; j < count; j++) all[j] += sums[j], sums[j] = 0;
    };
    rows(x, count, [&](const float* values, long number) {
      for (long j = 0; j < count; j += kLanes)
        store(sums + j, load<Floats>(sums + j) + f(load<Floats>(values + j), j));
      if (number % kFlushed == kFlushed - 1) flush();
    });
    flush();
    for (long j = 0; j < count; j++) to[j] = (float)all[j];
  }

  void floats_across(const char* x, char* y, long count) const {
    float result[kRun] = {}, more[kRun];
    auto each = [&](auto f) {
      for (long j = 0; j < count; j++) result[j] = f(j);
    };
    auto plain = [](Floats v, long) { return v; };
    auto extremes = [&](bool most) {
      each([&](long) { return most ? -INFINITY : INFINITY; });
      fold(x, result, count, [most](Floats a, Floats b) { return chosen(most, a, b); });
    };
    switch (a.op) {
      case QG_SUM: totals(x, result, count, plain); break;
      case QG_MEAN:
        totals(x, result, count, plain);
        each([&](long j) { return result[j] / inner_; });
        break;
      case QG_PROD:
        each([](long) { return 1.0f; });
        fold(x, result, count, [](Floats a, Floats b) { return a * b; });
        break;
      case QG_MAX: case QG_MIN: extremes(most()); break;
      case QG_ARGMAX: case QG_ARGMIN: return places(x, y, count);
      case QG_LOGSUMEXP:
        extremes(true);
        std::copy(result, result + kRun, more);
        for (float& high : more) high = std::isfinite(high) ? high : 0;
        totals(x, result + 0, count,
               [&](Floats v, long j) { return exponential(v - load<Floats>(more + j)); });
        each([&](long j) { return more[j] + std::log(result[j]); });
        break;
      case QG_VAR:
        totals(x, more, count, plain);
        for (float& mean : more) mean /= inner_;
        totals(x, result, count, [&](Floats v, long j) {
          Floats away = v - load<Floats>(more + j);
          return away * away;
        });
        each([&](long j) { return result[j] / ((float)inner_ - (float)a.ddof); });
        break;
      default: {
        bool all = a.op == QG_ALL;
        each([&](long) { return all; });
        fold(x, result, count, [all](Floats a, Floats b) {
          Floats yes = Floats{} + 1, no{};
          return all ? (b != 0 ? a : no) : (b != 0 ? yes : a);
        });
        for (long j = 0; j < count; j++) *(uint8_t*)(y + j * y_side_) = result[j] != 0;
        return;
      }
    }
    narrow(a.y.dtype, result, y, y_side_, count);
  }

  // The first row of the best element in each lane.
  void places(const char* x, char* y, long count) const {
    float best[kRun];
    int32_t where[kRun] = {};
    rows(x, count, [&](const float* values, long number) {
      if (number == 0) return (void)std::memcpy(best, values, up(count, kLanes) * sizeof(float));
      for (long j = 0; j < count; j += kLanes) {
        Floats old = load<Floats>(best + j), v = load<Floats>(values + j);
        Ints better = ((most() ? v > old : v < old) | (v != v)) & (old == old);
        store(best + j, better != 0 ? v : old);
        store(where + j, better != 0 ? Ints{} + (int)number : load<Ints>(where + j));
      }
    });
    for (long j = 0; j < count; j++) std::memcpy(y + j * y_side_ * 4, where + j, 4);
  }

  void integers_across(const char* x, char* y, long count) const {
    int64_t values[kRun], result[kRun];
    uint32_t where[kRun] = {};
    for (long j = 0; j < count; j++) result[j] = start();
    of_integers([&](auto join) {
      runs(x, [&](const char* from, long done) {
        for (long i = 0; i < last_; i++, from += step_ * x_size()) {
          read_integers(a.x.dtype, from, side_, values, count);
          if (chooses()) turn_sign(a.x.dtype, values, count);
          if (number())
            for (long j = 0; j < count; j++)
              where[j] = done + i > 0 && join(result[j], values[j]) != result[j] ? (uint32_t)(done + i) : where[j];
          bool fresh = number() && done + i == 0;
          for (long j = 0; j < count; j++) result[j] = fresh ? values[j] : join(result[j], values[j]);
        }
      });
    });
    if (number()) {
      for (long j = 0; j < count; j++) std::memcpy(y + j * y_side_ * 4, where + j, 4);
      return;
    }
    if (chooses()) turn_sign(a.x.dtype, result, count);
    write_integers(a.y.dtype, result, y, y_side_, count);
  }

  // ---- Integers ---------------------------------------------------------------------------------

  bool chooses() const { return number() || a.op == QG_MAX || a.op == QG_MIN; }

  int64_t start() const {
    if (a.op == QG_PROD || a.op == QG_ALL) return 1;
    return !chooses() ? 0 : most() ? INT64_MIN : INT64_MAX;
  }

  // Calls `f` with how two elements are joined.
  template <typename F>
  void of_integers(F f) const {
    switch (a.op) {
      case QG_SUM: return f([](int64_t a, int64_t b) { return (int64_t)((uint64_t)a + (uint64_t)b); });
      case QG_PROD: return f([](int64_t a, int64_t b) { return (int64_t)((uint64_t)a * (uint64_t)b); });
      case QG_ALL: return f([](int64_t a, int64_t b) { return (int64_t)(a != 0 && b != 0); });
      case QG_ANY: return f([](int64_t a, int64_t b) { return (int64_t)((a | b) != 0); });
      case QG_MAX: case QG_ARGMAX: return f([](int64_t a, int64_t b) { return a > b ? a : b; });
      default: return f([](int64_t a, int64_t b) { return a < b ? a : b; });
    }
  }

  const qg_reduce a;
  long inner_, last_, step_;
  long side_ = 0;  // from result to result in x, where those lie side by side
  long y_side_, width_, rows_, runs_;
};

}  // namespace

Maker make_reduce(const Table& table, long args) {
  return Maker(new Reduce(table, *table.args<qg_reduce>(args)));
}

}  // namespace qgraph
