// Products of a few rows with a dense weight, read once and as it is stored.

#include "products.hpp"

namespace qgraph {
namespace {

class FewRowsDense : public Product {
 public:
  explicit FewRowsDense(const qg_matmul& args) : Product(args), padded_(up(a.k, 16)) {}

  long tasks(int, int threads) const override { return entries_ * over(a.n, columns(threads)); }

  long own_bytes() const override {
    return (16 + a.m * padded_ + 2 * kMost * kPart) * (long)sizeof(float);
  }

  bool prepares(int) const override { return true; }
  void prepare(const Here& here, int) const override { *(long*)here.own = -1; }

  void run(const Here& here, int, long task) const override {
    long part = columns(here.threads), parts = over(a.n, part), entry = task / parts;
    Matrices at = matrices(here, entry);
    float *x = (float*)here.own + 16, *sums = x + a.m * padded_, *sums2 = sums + kMost * kPart;
    if (*(long*)here.own != entry) {
      for (long i = 0; i < a.m; i++) {
        widen(a.x.dtype, at.x + i * a.x_row * size_of(a.x.dtype), a.x_column, x + i * padded_, a.k);
        for (long j = a.k; j < padded_; j++) x[i * padded_ + j] = 0;
      }
      *(long*)here.own = entry;
    }
    long begin = task % parts * part, end = begin + part < a.n ? begin + part : a.n;
    for (; begin < end; begin += kPart) {
      long count = end - begin < kPart ? end - begin : kPart;
      for (long i = 0; i < a.m; i += kMost) {
        long some = a.m - i < kMost ? a.m - i : kMost;
        products(at.w, a.w, begin, count, x + i * padded_, some, sums);
        if (gated()) products(at.w2, a.w2, begin, count, x + i * padded_, some, sums2);
        finish(here, at, i, some, begin, sums, gated() ? sums2 : nullptr, kPart, count);
      }
    }
  }

 private:
  static constexpr long kMost = 4, kPart = 128;

  long padded_;

  long columns(int threads) const {
    long all = a.n * entries_;
    return up(part_of(all, 80000 / (a.k * (a.m + 1) + 1) + 1, threads), 4 * kLanes);
  }

  void products(const Matrices::Weight& w, const qg_weight& refs, long begin, long count,
                const float* x, long rows, float* sums) const {
    of_float(refs.codes.dtype, [&](auto d) {
      using D = decltype(d);
      const auto* from = (const typename D::Stored*)w.codes + begin * a.w_row;
      bool along = a.w_column == 1;
      if (rows == 1) along ? dots<D, 1>(from, count, x, rows, sums) : axpys<D, 1>(from, count, x, rows, sums);
      else if (rows == 2) along ? dots<D, 2>(from, count, x, rows, sums) : axpys<D, 2>(from, count, x, rows, sums);
      else along ? dots<D, kMost>(from, count, x, rows, sums) : axpys<D, kMost>(from, count, x, rows, sums);
    });
  }

  // Rows of the weight lie along k: four at a time, so that their sums do not wait for each other.
  template <typename D, int M>
  void dots(const typename D::Stored* w, long count, const float* x, long rows, float* sums) const {
    constexpr int R = 4;
    for (long j = 0; j < count; j += R) {
      const typename D::Stored* own[R];
      Floats totals[R][M] = {};
      QG_UNROLLED
      for (int r = 0; r < R; r++) own[r] = w + (j + r < count ? j + r : count - 1) * a.w_row;
      long k = 0;
      for (; k + kLanes <= a.k; k += kLanes)
        add<D, R, M>(own, k, kLanes, x, rows, totals);
      if (k < a.k) add<D, R, M>(own, k, a.k - k, x, rows, totals);
      QG_UNROLLED
      for (int r = 0; r < R; r++)
        QG_UNROLLED
        for (int m = 0; m < M; m++)
          if (j + r < count) sums[m * kPart + j + r] = sum(totals[r][m]);
    }
  }

  template <typename D, int R, int M>
  void add(const typename D::Stored* const (&own)[R], long k, long some, const float* x, long rows,
           Floats (&totals)[R][M]) const {
    Floats values[M];
    QG_UNROLLED
    for (int m = 0; m < M; m++) values[m] = load<Floats>(x + (m < rows ? m : rows - 1) * padded_ + k);
    QG_UNROLLED
    for (int r = 0; r < R; r++) {
      __builtin_prefetch(own[r] + k + 1024 / sizeof(typename D::Stored));
      Floats weight = some == kLanes ? D::load(own[r] + k) : load_part<D>(own[r] + k, some, nullptr);
      QG_UNROLLED
      for (int m = 0; m < M; m++) totals[r][m] += weight * values[m];
    }
  }

  // Columns of y lie side by side in the weight: sums of some of them, all along k.
  template <typename D, int M>
  void axpys(const typename D::Stored* w, long count, const float* x, long rows, float* sums) const {
    constexpr int R = 4;
    for (long j = 0; j < count; j += R * kLanes) {
      Floats totals[R][M] = {};
      bool whole = j + R * kLanes <= count;
      for (long k = 0; k < a.k; k++) {
        const auto* own = w + k * a.w_column + j;
        QG_UNROLLED
        for (int r = 0; r < R; r++) {
          __builtin_prefetch(own + 8 * a.w_column + r * kLanes);
          if (!whole && j + r * kLanes >= count) continue;
          Floats weight = whole ? D::load(own + r * kLanes)
                                : load_part<D>(own + r * kLanes, count - j - r * kLanes, nullptr);
          QG_UNROLLED
          for (int m = 0; m < M; m++)
            totals[r][m] += weight * x[(m < rows ? m : rows - 1) * padded_ + k];
        }
      }
      QG_UNROLLED
      for (int r = 0; r < R; r++)
        QG_UNROLLED
        for (int m = 0; m < M; m++) store(sums + m * kPart + j + r * kLanes, totals[r][m]);
    }
  }
};

}  // namespace

Maker few_rows_dense(const qg_matmul& args) { return Maker(new FewRowsDense(args)); }

}  // namespace qgraph
