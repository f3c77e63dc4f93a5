// The checks of a product, and which way it goes.

#include <initializer_list>

#include "products.hpp"

namespace qgraph {
namespace {

constexpr long kFewRows = 4;

struct Shape {
  int64_t sizes[6], strides[6];
};

Shape with_batch(const qg_matmul& a, const int64_t* batch, long rows, long columns, long row,
                 long column) {
  Shape shape{};
  for (long i = 0; i < a.batch_rank; i++) shape.sizes[i] = a.batch[i], shape.strides[i] = batch[i];
  shape.sizes[a.batch_rank] = rows, shape.strides[a.batch_rank] = row;
  shape.sizes[a.batch_rank + 1] = columns, shape.strides[a.batch_rank + 1] = column;
  return shape;
}

class Checks {
 public:
  Checks(const Table& table, const qg_matmul& args) : table_(table), a_(args) {}

  void all() const {
    if (a_.m < 0 || a_.n < 0 || a_.k < 0 || a_.batch_rank < 0 || a_.batch_rank > 4)
      throw Mistake("a product of %ld by %ld by %ld", (long)a_.m, (long)a_.n, (long)a_.k);
    long entries = 1;
    for (long i = 0; i < a_.batch_rank; i++) entries *= a_.batch[i];
    matrix("x", a_.x, a_.x_batch, a_.m, a_.k, a_.x_row, a_.x_column,
           given(a_.lhs) ? a_.x_matrices : 1, a_.x_stack);
    if (a_.rounded) rounds();
    matrix("y", a_.y, a_.y_batch, a_.m, a_.n, a_.y_row, a_.y_column, 1, 0);
    same_as_y("times", a_.times, a_.times_batch, a_.times_row);
    same_as_y("add", a_.add, a_.add_batch, a_.add_row);
    if (given(a_.bias)) {
      table_.is_float("bias", a_.bias);
      table_.holds("bias", a_.bias, a_.n);
    }
    numbers("lhs", a_.lhs, entries, a_.x_matrices);
    numbers("rhs", a_.rhs, entries, a_.w_matrices);
    if (a_.activation < QG_IDENTITY || a_.activation > QG_TANH)
      throw Mistake("activation %ld is none", (long)a_.activation);
    weight("w", a_.w);
    if (given(a_.w2.codes)) weight("w2", a_.w2);
  }

 private:
  void rounds() const {
    if (a_.batch_rank || given(a_.lhs) || given(a_.rhs) || a_.k % 32 || a_.columns_first ||
        a_.mode != QG_AFFINE || (a_.bits != 4 && a_.bits != 8))
      throw Mistake("rounded x wants one affine weight of 4 or 8 bits");
  }

  void numbers(const char* name, const qg_ref& ref, long entries, long matrices) const {
    if (!given(ref)) return;
    table_.one_of(name, ref, ref.dtype == QG_U32 || ref.dtype == QG_I32, "int32 or uint32");
    table_.holds(name, ref, entries);
    if (matrices < 1) throw Mistake("%s picks from %ld matrices", name, matrices);
  }

  void matrix(const char* name, const qg_ref& ref, const int64_t* batch, long rows, long columns,
              long row, long column, long matrices, long stack) const {
    table_.is_float(name, ref);
    Shape shape = with_batch(a_, batch, rows, columns, row, column);
    for (long i : {0L, matrices - 1}) {
      qg_ref moved = ref;
      moved.offset += i * stack * size_of(ref.dtype);
      table_.holds(name, moved, a_.batch_rank + 2, shape.sizes, shape.strides);
    }
  }

  void same_as_y(const char* name, const qg_ref& ref, const int64_t* batch, long row) const {
    if (!given(ref)) return;
    table_.one_of(name, ref, ref.dtype == a_.y.dtype, "of y's dtype");
    matrix(name, ref, batch, a_.m, a_.n, row, 1, 1, 0);
  }

  void weight(const char* name, const qg_weight& w) const {
    long matrices = given(a_.rhs) ? a_.w_matrices : 1;
    if (a_.mode == QG_DENSE)
      return matrix(name, w.codes, a_.w_batch, a_.n, a_.k, a_.w_row, a_.w_column, matrices,
                    a_.w_stack);
    long wide = a_.columns_first ? a_.n : a_.k;
    bool known = of_code(a_.mode, a_.bits, [](auto) {});
    long group = a_.group;
    bool fits = a_.mode == QG_NVFP4   ? group == 16
                : a_.mode == QG_AFFINE ? group == 32 || group == 64 || group == 128
                                       : group == 32;
    bool bits = a_.mode == QG_AFFINE || a_.bits == (a_.mode == QG_MXFP8 ? 8 : 4);
    if (!known || !fits || !bits || wide % group)
      throw Mistake("no packed weight has mode %ld, %ld bits, groups of %ld and rows of %ld",
                    (long)a_.mode, (long)a_.bits, group, wide);
    for (long i = 0; i < a_.batch_rank; i++) matrices += (a_.batch[i] - 1) * a_.w_batch[i];
    if (given(a_.rhs)) matrices += (a_.w_matrices - 1) * (a_.w_stack - 1);
    long rows = matrices * (a_.columns_first ? a_.k : a_.n), groups = rows * (wide / group);
    qg_ref bytes = w.codes, scales = w.scales;
    bytes.dtype = QG_U8;
    table_.holds(name, bytes, rows * (wide * a_.bits / 8));
    if (a_.mode != QG_AFFINE) scales.dtype = QG_U8;
    else table_.is_float("scales", scales);
    table_.holds("scales", scales, groups);
    if (a_.mode != QG_AFFINE) return;
    table_.is_float("biases", w.biases);
    table_.one_of("biases", w.biases, w.biases.dtype == scales.dtype, "of the scales' dtype");
    table_.holds("biases", w.biases, groups);
  }

  const Table& table_;
  const qg_matmul& a_;
};

struct Nothing : Work {
  long tasks(int, int) const override { return 0; }
  void run(const Here&, int, long) const override {}
};

}  // namespace

Maker make_matmul(const Table& table, long at) {
  qg_matmul a = *table.args<qg_matmul>(at);
  Checks(table, a).all();
  if (a.mode != QG_AFFINE && a.mode != QG_DENSE) a.w.biases.buffer = a.w2.biases.buffer = -1;
  long entries = 1;
  for (long i = 0; i < a.batch_rank; i++) entries *= a.batch[i];
  if (a.m == 0 || a.n == 0 || entries == 0) return Maker(new Nothing);
  if (a.rounded) return rounded_rows(a);
  if (a.m == 1 && given(a.rhs) && entries >= 2 * a.w_matrices && a.k > 0) return experts(a);
  if (a.m <= kFewRows && a.k > 0) {
    if (a.mode == QG_DENSE && (a.w_column == 1 || a.w_row == 1)) return few_rows_dense(a);
    if (a.mode != QG_DENSE && a.n >= 4 && !a.columns_first) return few_rows(a);
  }
  return panels(a);
}

}  // namespace qgraph
