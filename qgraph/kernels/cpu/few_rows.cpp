// Products of a few rows with packed weights: codes stay in registers.
//
// The sum over a group is scale * sum(x code) + bias * sum(x): a code is one table look-up and one
// multiplication a row of x.  x is first put in the order in which units give their codes.

#include <utility>

#include "products.hpp"

namespace qgraph {
namespace {

constexpr int kRows = 4;        // of the weight at a time
constexpr int kMost = 4;        // of x at a time
constexpr long kPart = 128;     // columns of y between epilogues

// What the loops over a row of the weight need to know.
struct Problem {
  long k, group, groups, row_bytes;
  const uint8_t* codes;  // of the first of kRows rows
  const uint8_t* end;    // of the weight
  const float *scales, *biases;  // of those rows, one after another
  const float* x;        // arranged, rows `x_step` apart
  const float* sums;     // of x over groups, rows `sums_step` apart
  long x_step, sums_step;
  long rows;             // of x
  float* out;            // rows kPart apart
};

// The first `count` lanes: what follows is of the next row, and may be NaN.
Floats kept(Floats x, long count) {
  constexpr Ints lane = lanes_of([](int i) { return i; });
  return lane < (int)count ? x : Floats{};
}

// Sums of two or four vectors, each in the first of its share of the lanes.
template <int R, typename F>
Floats sums_of_rows(F row) {
  Floats v;
  if constexpr (R == 2) v = pairs(row(0), row(1));
  else v = pairs(pairs(row(0), row(1)), pairs(row(2), row(3)));
  if constexpr (kLanes / R > 4) v += across<4>(v);
  if constexpr (kLanes / R > 2) v += across<2>(v);
  if constexpr (kLanes / R > 1) v += across<1>(v);
  return v;
}

template <typename Code>
struct Dots {
  using U = Units<Code>;

  // R rows of the weight from number `first` on by M rows of x; the last stands in for missing ones.
  template <int R, int M>
  static void dots(const Problem& p, int first) {
    const Code code{};
    const uint8_t* codes = p.codes + first * p.row_bytes;
    const float *scales = p.scales + first * p.groups, *biases = p.biases + first * p.groups;
    Floats totals[R][M] = {};
    long row[M];
    QG_UNROLLED
    for (int m = 0; m < M; m++) row[m] = m < p.rows ? m : p.rows - 1;
    for (long g = 0; Code::kBiased && g < p.groups; g += kLanes) {
      QG_UNROLLED
      for (int r = 0; r < R; r++) {
        Floats bias = load<Floats>(biases + r * p.groups + g);
        if (g + kLanes > p.groups) bias = kept(bias, p.groups - g);
        QG_UNROLLED
        for (int m = 0; m < M; m++)
          totals[r][m] += bias * load<Floats>(p.sums + row[m] * p.sums_step + g);
      }
    }
    Ints group_of_lane;
    for (int i = 0; i < kLanes; i++) group_of_lane[i] = i * U::kCodes / (int)p.group;
    bool one_group = p.group >= U::kBlock;
    for (long at = 0; at < p.k; at += U::kBlock, codes += kLanes * U::kBytes) {
      long left = (p.k - at) / U::kCodes;
      bool inside = codes + (R - 1) * p.row_bytes + kLanes * U::kBytes + 1 <= p.end;
      U units[R];
      QG_UNROLLED
      for (int r = 0; r < R; r++) {
        const uint8_t* own = codes + r * p.row_bytes;
        __builtin_prefetch(own + kRows * p.row_bytes);  // the rows after these
        units[r] = inside ? U::whole(own) : U::last(own, left < kLanes ? left : kLanes);
        if (left < kLanes) units[r].keep(left);
      }
      Floats part[R][M] = {};
      add<R, M>(code, units, p.x + at, p.x_step, row, part,
                std::make_integer_sequence<int, U::kCodes>());
      const float* own = scales + at / p.group;
      QG_UNROLLED
      for (int r = 0; r < R; r++) {
        const float* of_row = own + r * p.groups;
        Floats scale = one_group ? all(*of_row)
                                 : __builtin_shuffle(load<Floats>(of_row), group_of_lane);
        if (left < kLanes) scale = kept(scale, left);
        QG_UNROLLED
        for (int m = 0; m < M; m++) totals[r][m] += scale * part[r][m];
      }
    }
    QG_UNROLLED
    for (int m = 0; m < M; m++) {
      Floats results = sums_of_rows<R>([&](int r) { return totals[r][m]; });
      QG_UNROLLED
      for (int r = 0; r < R; r++) p.out[row[m] * kPart + first + r] = results[r * (kLanes / R)];
    }
  }

  template <int R, int M, int... c>
  static void add(const Code& code, const U (&units)[R], const float* x, long step,
                  const long (&row)[M], Floats (&part)[R][M], std::integer_sequence<int, c...>) {
    (add_code<R, M, c>(code, units, x, step, row, part), ...);
  }

  template <int R, int M, int c>
  static void add_code(const Code& code, const U (&units)[R], const float* x, long step,
                       const long (&row)[M], Floats (&part)[R][M]) {
    Floats values[M];
    QG_UNROLLED
    for (int m = 0; m < M; m++) values[m] = load<Floats>(x + row[m] * step + c * kLanes);
    QG_UNROLLED
    for (int r = 0; r < R; r++) {
      Floats weight = code.value(units[r].template low_bits<c>());
      QG_UNROLLED
      for (int m = 0; m < M; m++) part[r][m] += weight * values[m];
    }
  }
};

class FewRows : public Product {
 public:
  explicit FewRows(const qg_matmul& args) : Product(args) {
    of_code(a.mode, a.bits, [&](auto code) {
      using Code = decltype(code);
      one_ = Dots<Code>::template dots<kRows, 1>;
      two_ = Dots<Code>::template dots<kRows, 2>;
      more_ = Dots<Code>::template dots<2, kMost>;
      codes_ = Units<Code>::kCodes;
      centre_ = Code::kCentre;
    });
    block_ = kLanes * codes_;
    padded_ = up(a.k, block_);
    groups_ = a.k / a.group;
    room_ = floats_of(groups_);
    scale_room_ = floats_of(kRows * groups_ + 2 * kLanes);
  }

  long tasks(int, int threads) const override { return entries_ * over(a.n, columns(threads)); }

  long own_bytes() const override {
    long floats = 32 + a.m * (padded_ + room_) + 2 * scale_room_ + 2 * a.m * kPart;
    return floats * (long)sizeof(float);
  }

  bool prepares(int) const override { return true; }
  void prepare(const Here& here, int) const override {
    std::memset(here.own, 0, own_bytes());
    *(long*)here.own = -1;
  }

  void run(const Here& here, int, long task) const override {
    long part = columns(here.threads), parts = over(a.n, part), entry = task / parts;
    Matrices at = matrices(here, entry);
    float* x = (float*)here.own + 16;
    float* sums_of_x = x + a.m * padded_;
    if (*(long*)here.own != entry) {
      for (long i = 0; i < a.m; i++) arrange(at.x, i, x + i * padded_, sums_of_x + i * room_);
      *(long*)here.own = entry;
    }
    float* scales = sums_of_x + a.m * room_;
    float* sums = scales + 2 * scale_room_ + 16;
    float* sums2 = gated() ? sums + a.m * kPart : nullptr;
    long begin = task % parts * part, end = begin + part < a.n ? begin + part : a.n;
    for (; begin < end; begin += kPart) {
      long count = end - begin < kPart ? end - begin : kPart;
      products(at.w, a.w, begin, count, x, sums_of_x, scales, sums);
      if (sums2) products(at.w2, a.w2, begin, count, x, sums_of_x, scales, sums2);
      finish(here, at, 0, a.m, begin, sums, sums2, kPart, count);
    }
  }

 private:
  void (*one_)(const Problem&, int);
  void (*two_)(const Problem&, int);
  void (*more_)(const Problem&, int);
  float centre_;
  long codes_, block_, padded_, groups_, room_, scale_room_;

  // Columns of a task: some 4 microseconds at least.
  long columns(int threads) const {
    long least = up(80000 / (a.k * (a.m + 1)) + 1, 8), all = a.n * entries_;
    return up(part_of(all, least, threads), 8);
  }

  // Element (c, lane) of a block is the unit's code number c of that lane.
  void arrange(const char* x, long row, float* to, float* sums) const {
    constexpr long kMostOfBlock = 16 * kLanes;
    const char* from = x + row * a.x_row * size_of(a.x.dtype);
    float block[kMostOfBlock], group_sum = 0;
    long group = 0;
    for (long at = 0; at < padded_; at += block_, to += block_) {
      long some = a.k - at < block_ ? a.k - at : block_;
      widen(a.x.dtype, from + at * a.x_column * size_of(a.x.dtype), a.x_column, block, some);
      for (long i = some; i < block_; i++) block[i] = 0;
      for (long lane = 0; lane < kLanes; lane++)
        for (long c = 0; c < codes_; c++) to[c * kLanes + lane] = block[lane * codes_ + c];
      for (long i = 0; i < some; i += 16) {  // groups are whole sixteens
        float part = 0;
        for (long j = 0; j < 16; j += kLanes) part += sum(load<Floats>(block + i + j));
        group_sum += part;
        if ((at + i + 16) % a.group == 0) sums[group++] = group_sum, group_sum = 0;
      }
    }
  }

  void products(const Matrices::Weight& w, const qg_weight& refs, long begin, long count,
                const float* x, const float* sums_of_x, float* scales, float* out) const {
    Problem p{a.k, a.group, groups_, row_bytes(), nullptr, w.end, scales, scales + scale_room_,
              nullptr, nullptr, padded_, room_, 0, nullptr};
    for (long next = 0; next < count; next += kRows) {
      // The last four may be some again, even ones before `begin`: `out` has room before it.
      long j = begin + next + kRows <= a.n ? next : a.n - kRows - begin;
      group_scales(a, w, refs, (begin + j) * groups_, kRows * groups_, centre_, scales,
                   scales + scale_room_);
      p.codes = (const uint8_t*)w.codes + (begin + j) * row_bytes();
      for (long i = 0; i < a.m; i += kMost) {
        p.rows = a.m - i < kMost ? a.m - i : kMost;
        p.x = x + i * padded_;
        p.sums = sums_of_x + i * room_;
        p.out = out + i * kPart + j;
        if (p.rows == 1) {
          one_(p, 0);
        } else if (p.rows == 2) {
          two_(p, 0);
        } else {
          more_(p, 0);
          more_(p, 2);
        }
      }
    }
  }
};

}  // namespace

Maker few_rows(const qg_matmul& args) { return Maker(new FewRows(args)); }

}  // namespace qgraph
