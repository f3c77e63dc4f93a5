// Norms and softmax: a row at a time, in float32.

#include "functions.hpp"
#include "walks.hpp"

namespace qgraph {
namespace {

class Norm : public Work {
 public:
  Norm(const Table& table, const qg_norm& args) : a(args) {
    for (const auto* ref : {&a.x, &a.y}) {
      bool x = ref == &a.x;
      const char* name = x ? "x" : "y";
      int64_t shape[] = {a.rows, a.columns};
      int64_t strides[] = {x ? a.x_row : a.y_row, x ? a.x_column : a.y_column};
      table.is_float(name, *ref);
      table.holds(name, *ref, 2, shape, strides);
    }
    for (const auto* ref : {&a.weight, &a.bias}) {
      if (!given(*ref)) continue;
      table.is_float("weight or bias", *ref);
      table.holds("weight or bias", *ref, a.columns);
    }
  }

  long tasks(int, int threads) const override {
    return a.columns && a.rows ? over(a.rows, part(threads)) : 0;
  }

  long own_bytes() const override { return 2 * up(a.columns, 16) * (long)sizeof(float); }

  void run(const Here& here, int, long task) const override {
    long begin = task * part(here.threads), end = begin + part(here.threads);
    for (long i = begin; i < end && i < a.rows; i++) row(here, i);
  }

 private:
  long part(int threads) const { return part_of(a.rows, 32000 / (a.columns + 1) + 1, threads); }

  void row(const Here& here, long i) const {
    float *x = (float*)here.own, *factors = x + up(a.columns, 16);
    widen(a.x.dtype, here(a.x) + i * a.x_row * size_of(a.x.dtype), a.x_column, x, a.columns);
    for (long j = a.columns; j % kLanes; j++) x[j] = 0;
    float mean = 0;
    if (a.layer) {
      mean = total(x, [](Floats v) { return v; }) / a.columns;
      each(x, [&](Floats v, long) { return v - mean; });
      for (long j = a.columns; j % kLanes; j++) x[j] = 0;
    }
    float square = total(x, [](Floats v) { return v * v; }) / a.columns;
    float scale = 1 / std::sqrt(square + (float)a.eps);
    int dtype = a.y.dtype;
    each(x, [&](Floats v, long) { return rounded(dtype, v * scale); });
    if (given(a.weight)) {
      widen(a.weight.dtype, here(a.weight), 1, factors, a.columns);
      each(x, [&](Floats v, long j) { return rounded(dtype, v * load<Floats>(factors + j)); });
    }
    if (given(a.bias)) {
      widen(a.bias.dtype, here(a.bias), 1, factors, a.columns);
      each(x, [&](Floats v, long j) { return v + load<Floats>(factors + j); });
    }
    narrow(dtype, x, here(a.y) + i * a.y_row * size_of(dtype), a.y_column, a.columns);
  }

  template <typename F>
  void each(float* x, F f) const {
    for (long j = 0; j < a.columns; j += kLanes) store(x + j, f(load<Floats>(x + j), j));
  }

  template <typename F>
  float total(const float* x, F f) const {
    Floats even{}, odd{};
    long j = 0;
    for (; j + kLanes < a.columns; j += 2 * kLanes) {
      even += f(load<Floats>(x + j));
      odd += f(load<Floats>(x + j + kLanes));
    }
    if (j < a.columns) even += f(load<Floats>(x + j));
    return sum(even + odd);
  }

  const qg_norm a;
};

class Softmax : public RowWork {
 public:
  Softmax(const Table& table, const qg_rows& rows) : RowWork(table, rows, rows.length, rows.length) {
    table.is_float("x", r.x);
    table.is_float("y", r.y);
  }

  long own_bytes() const override { return up(r.length, 16) * (long)sizeof(float); }

 protected:
  long cost() const override { return 20; }

  void row(const Here& here, long, const char* x, char* y) const override {
    float* own = (float*)here.own;
    widen(r.x.dtype, x, r.x_axis, own, r.length);
    for (long j = r.length; j % kLanes; j++) own[j] = -INFINITY;
    Floats most = all(-INFINITY), added{};
    for (long j = 0; j < r.length; j += kLanes) most = larger(most, load<Floats>(own + j));
    float high = largest(most);
    for (long j = 0; j < r.length; j += kLanes) {
      Floats e = exponential(load<Floats>(own + j) - high);
      store(own + j, e);
      if (j + kLanes > r.length)
        for (long i = r.length - j; i < kLanes; i++) e[i] = 0;
      added += e;
    }
    float scale = 1 / sum(added);
    for (long j = 0; j < r.length; j += kLanes) store(own + j, load<Floats>(own + j) * scale);
    narrow(r.y.dtype, own, y, r.y_axis, r.length);
  }
};

}  // namespace

Maker make_norm(const Table& table, long args) {
  return Maker(new Norm(table, *table.args<qg_norm>(args)));
}

Maker make_softmax(const Table& table, long args) {
  return Maker(new Softmax(table, table.args<qg_softmax>(args)->rows));
}

}  // namespace qgraph
