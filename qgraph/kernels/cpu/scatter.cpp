// Elements written to places that indices give, each joined with what is there.
//
// A task has some of the rows and goes through all indices in order, so that no two threads write
// one element and sums do not depend on who was faster.

#include <algorithm>

#include "walks.hpp"

namespace qgraph {
namespace {

constexpr long kRun = 256;  // elements at a time

class Scatter : public Work {
 public:
  Scatter(const Table& table, const qg_scatter& args) : a(args) {
    if (a.rank < 0 || a.rank >= QG_RANK) throw Mistake("it has %ld axes of rows", (long)a.rank);
    bool known = a.op == QG_SUM || a.op == QG_PROD || a.op == QG_MAX || a.op == QG_MIN || a.op == QG_SET;
    if (!known) throw Mistake("scatter %ld is none", (long)a.op);
    if (a.x.dtype != a.y.dtype) throw Mistake("dtype %d is put into %d", a.x.dtype, a.y.dtype);
    if (a.count < 0 || a.low > a.high) throw Mistake("a negative size");
    table.one_of("offsets", a.offsets, a.offsets.dtype == QG_I64, "int64");
    table.holds("offsets", a.offsets, a.count);
    int64_t shape[QG_RANK], strides[QG_RANK];
    std::copy(a.shape, a.shape + a.rank, shape);
    std::copy(a.x_strides, a.x_strides + a.rank, strides);
    shape[a.rank] = a.count, strides[a.rank] = a.x_axis;
    table.holds("x", a.x, a.rank + 1, shape, strides);
    for (long offset : {a.low, a.high}) {
      qg_ref moved = a.y;
      moved.offset += offset * size_of(a.y.dtype);
      table.holds("y", moved, a.rank, a.shape, a.y_strides);
    }
    last_ = a.rank ? a.shape[a.rank - 1] : 1;
    runs_ = over(last_, kRun);
    outer_ = a.rank ? product_of(a.rank - 1, a.shape) : 1;
    if (last_ == 0 || a.count == 0) outer_ = 0;
  }

  long tasks(int, int threads) const override {
    return outer_ ? over(outer_ * runs_, part(threads)) : 0;
  }

  void run(const Here& here, int, long task) const override {
    long begin = task * part(here.threads), end = begin + part(here.threads);
    long size = size_of(a.y.dtype), rank = a.rank ? a.rank - 1 : 0;
    long step_x = a.rank ? a.x_strides[rank] : 0, step_y = a.rank ? a.y_strides[rank] : 0;
    const auto* offsets = here.at<const int64_t>(a.offsets);
    for (long i = begin; i < end && i < outer_ * runs_; i++) {
      long row = i / runs_, first = i % runs_ * kRun, some = std::min(last_ - first, kRun);
      const char* x = here(a.x) + (offset_of(row, rank, a.shape, a.x_strides) + first * step_x) * size;
      char* y = here(a.y) + (offset_of(row, rank, a.shape, a.y_strides) + first * step_y) * size;
      for (long n = 0; n < a.count; n++) {
        long at = std::clamp<int64_t>(offsets[n], a.low, a.high);
        join(x + n * a.x_axis * size, step_x, y + at * size, step_y, some);
      }
    }
  }

 private:
  long part(int threads) const {
    return part_of(outer_ * runs_, 16000 / (std::min(last_, kRun) * (a.count + 1) + 1) + 1, threads);
  }

  void join(const char* x, long step_x, char* y, long step_y, long count) const {
    if (a.op == QG_SET) return set(x, step_x, y, step_y, count);
    if (is_float(a.y.dtype)) {
      float from[kRun], to[kRun];
      widen(a.x.dtype, x, step_x, from, count);
      widen(a.y.dtype, y, step_y, to, count);
      for (long i = 0; i < count; i++) to[i] = joined(to[i], from[i]);
      return narrow(a.y.dtype, to, y, step_y, count);
    }
    long size = size_of(a.y.dtype);
    for (long i = 0; i < count; i++) {
      char* to = y + i * step_y * size;
      const char* from = x + i * step_x * size;
      if (a.y.dtype == QG_U64) {
        put<uint64_t>(to, joined(load<uint64_t>(to), load<uint64_t>(from)));
        continue;
      }
      int64_t v = joined(integer_at(a.y.dtype, to), integer_at(a.y.dtype, from));
      if (a.y.dtype == QG_BOOL) put<uint8_t>(to, v != 0);
      else if (size == 1) put<uint8_t>(to, v);
      else if (size == 2) put<uint16_t>(to, v);
      else if (size == 4) put<uint32_t>(to, v);
      else put<int64_t>(to, v);
    }
  }

  void set(const char* x, long step_x, char* y, long step_y, long count) const {
    long size = size_of(a.y.dtype);
    if (step_x == 1 && step_y == 1) return (void)std::memcpy(y, x, count * size);
    for (long i = 0; i < count; i++) std::memcpy(y + i * step_y * size, x + i * step_x * size, size);
  }

  template <typename T>
  static void put(char* to, T value) {
    std::memcpy(to, &value, sizeof(T));
  }

  template <typename T>
  T joined(T a, T b) const {
    if (this->a.op == QG_SUM) return added(a, b);
    if (this->a.op == QG_PROD) return multiplied(a, b);
    if (a != a) return a;  // NaN is passed on
    return (this->a.op == QG_MAX ? b > a : b < a) || b != b ? b : a;
  }

  static float added(float a, float b) { return a + b; }
  static float multiplied(float a, float b) { return a * b; }
  static uint64_t added(uint64_t a, uint64_t b) { return a + b; }
  static uint64_t multiplied(uint64_t a, uint64_t b) { return a * b; }
  static int64_t added(int64_t a, int64_t b) { return (int64_t)((uint64_t)a + (uint64_t)b); }
  static int64_t multiplied(int64_t a, int64_t b) { return (int64_t)((uint64_t)a * (uint64_t)b); }

  const qg_scatter a;
  long last_, runs_, outer_;
};

}  // namespace

Maker make_scatter(const Table& table, long args) {
  return Maker(new Scatter(table, *table.args<qg_scatter>(args)));
}

}  // namespace qgraph
