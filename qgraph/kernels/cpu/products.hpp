// What the ways to carry out a product share: its matrices, and what follows the sums.
#pragma once

#include "codes.hpp"
#include "work.hpp"

namespace qgraph {

// The matrices of one of a batch.
struct Matrices {
  const char* x;
  struct Weight {
    const char *codes = nullptr, *scales = nullptr, *biases = nullptr;
    const uint8_t* end = nullptr;       // of the codes of this matrix
    const char* scales_end = nullptr;   // and of its scales; that of biases is as far
  } w, w2;
  char *y, *times, *add;
};

class Product : public Work {
 public:
  explicit Product(const qg_matmul& args) : a(args) {
    for (long i = 0; i < a.batch_rank; i++) entries_ *= a.batch[i];
    plain_ = a.y.dtype == QG_F32 && a.y_column == 1 && a.alpha == 1 && !given(a.bias) &&
             a.activation == QG_IDENTITY && !gated() && !given(a.times) && !given(a.add);
  }

 protected:
  const qg_matmul a;
  long entries_ = 1;
  bool plain_;

  bool packed() const { return a.mode != QG_DENSE; }
  bool gated() const { return given(a.w2.codes); }

  // Does another product read the very rows that this one reads?
  bool same_rows(const Product& other) const {
    const qg_matmul& b = other.a;
    return a.x.buffer == b.x.buffer && a.x.offset == b.x.offset && a.x.dtype == b.x.dtype &&
           a.m == b.m && a.k == b.k && a.x_row == b.x_row && a.x_column == b.x_column &&
           !a.batch_rank && !b.batch_rank && !given(a.lhs) && !given(b.lhs);
  }

  long groups() const { return packed() ? (a.columns_first ? a.n : a.k) / a.group : 0; }

  Matrices matrices(const Here& here, long entry) const;

  static long number(const Here& here, const qg_ref& ref, long entry, long count) {
    long number = integer_at(ref.dtype, here(ref) + entry * 4);
    return number < 0 ? 0 : number >= count ? count - 1 : number;
  }

  static char* moved(const Here& here, const qg_ref& ref, long elements) {
    return given(ref) ? here(ref) + elements * size_of(ref.dtype) : nullptr;
  }

  Matrices::Weight weight(const Here& here, const qg_weight& w, long at) const {
    if (!given(w.codes)) return {};
    if (!packed()) return {moved(here, w.codes, at)};
    long rows = a.columns_first ? a.k : a.n, bytes = rows * row_bytes();
    long each = rows * groups() * scale_size(a.mode, w.scales.dtype);
    const char* codes = here(w.codes) + at * bytes;
    return {codes, here(w.scales) + at * each,
            given(w.biases) ? here(w.biases) + at * each : nullptr, (const uint8_t*)codes + bytes,
            here(w.scales) + at * each + each};
  }

  long row_bytes() const { return (a.columns_first ? a.n : a.k) * a.bits / 8; }

  // Writes `rows` of y from number `i` on, `count` columns from `j` on, of sums (and sums with w2),
  // rows `step` apart, which are spoilt.
  void finish(const Here& here, const Matrices& at, long i, long rows, long j, float* sums,
              float* sums2, long step, long count) const;
};

// Scales of `count` groups from number `first` on, and biases plus `centre` of each, to float32 in
// whole vectors: past the last they are zero.
void group_scales(const qg_matmul& a, const Matrices::Weight& w, const qg_weight& refs, long first,
                  long count, float centre, float* scales, float* biases);

// Room for `count` floats that vectors may read and write up to their end.
inline long floats_of(long count) { return up(count, 16); }

Maker few_rows(const qg_matmul& args);      // packed, each code used as it is read
Maker few_rows_dense(const qg_matmul& args);  // a dense weight read as it is stored
Maker panels(const qg_matmul& args);        // blocks of the weight made dense in the cache
Maker experts(const qg_matmul& args);       // the same, rows gathered by matrix
Maker rounded_rows(const qg_matmul& args);  // rows in bytes: codes times codes

bool multiplies_bytes();  // has the processor an instruction for the last of them?

}  // namespace qgraph
