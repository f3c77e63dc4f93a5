// Walking through arrays by strides.
#pragma once

#include "work.hpp"

namespace qgraph {

// Where row number `row` begins, in elements.
inline long offset_of(long row, long rank, const int64_t* shape, const int64_t* strides) {
  long at = 0;
  for (long i = rank - 1; i >= 0; i--) at += row % shape[i] * strides[i], row /= shape[i];
  return at;
}

inline long product_of(long rank, const int64_t* shape) {
  long count = 1;
  for (long i = 0; i < rank; i++) count *= shape[i];
  return count;
}

// Work on rows, each along one axis, of `qg_rows`.
class RowWork : public Work {
 public:
  RowWork(const Table& table, const qg_rows& rows, long x_length, long y_length) : r(rows) {
    if (r.rank < 0 || r.rank >= QG_RANK) throw Mistake("it has %ld axes of rows", (long)r.rank);
    if (r.length < 0) throw Mistake("rows of %ld", (long)r.length);
    check(table, "x", r.x, r.x_strides, r.x_axis, x_length);
    check(table, "y", r.y, r.y_strides, r.y_axis, y_length);
    count_ = product_of(r.rank, r.shape);
    if (r.length == 0) count_ = 0;
  }

  long tasks(int, int threads) const override { return count_ ? over(count_, part(threads)) : 0; }

  void run(const Here& here, int, long task) const override {
    long begin = task * part(here.threads), end = begin + part(here.threads);
    for (long i = begin; i < end && i < count_; i++) {
      const char* x = here(r.x) + offset_of(i, r.rank, r.shape, r.x_strides) * size_of(r.x.dtype);
      char* y = here(r.y) + offset_of(i, r.rank, r.shape, r.y_strides) * size_of(r.y.dtype);
      row(here, i, x, y);
    }
  }

 protected:
  virtual void row(const Here& here, long number, const char* x, char* y) const = 0;
  virtual long cost() const { return 4; }  // nanoseconds for sixteen elements, about

  void check(const Table& table, const char* name, const qg_ref& ref, const int64_t* strides,
             long axis, long length) const {
    int64_t shape[QG_RANK], all[QG_RANK];
    for (long i = 0; i < r.rank; i++) shape[i] = r.shape[i], all[i] = strides[i];
    shape[r.rank] = length, all[r.rank] = axis;
    table.holds(name, ref, r.rank + 1, shape, all);
  }

  const qg_rows r;
  long count_;

 private:
  long part(int threads) const {
    return part_of(count_, 64000 / (r.length * cost() + 64) + 1, threads);
  }
};

}  // namespace qgraph
