// Products of many rows, at the rate of the machine's multiplications.
//
// A task takes some rows of x and kWide columns of y.  It fills a panel of the weight, a stretch of
// k at a time, and runs tiles of up to kTall rows over it, whose sums stay in registers.  Rows that
// fit a core's cache are read where they lie: packed by two threads they would come from the other
// core's cache, and there is one barrier less.

#include "panels.hpp"

namespace qgraph {
namespace {

constexpr long kAhead = 24;  // columns of x that are fetched before they are read
constexpr long kNear = 512 << 10;  // bytes of x that stay in a core's cache beside a panel

// Where the rows of x for a tile lie: `row` and `column` elements from one to the next, `stretch`
// columns side by side and `next` elements from stretch to stretch.
struct InStretches {
  static constexpr long row = kStretch, column = 1, stretch = kStretch, next = kTall * kStretch;
};
struct InColumns {
  static constexpr long row = 1, column = kTall, stretch = kStretch, next = kTall * kStretch;
};
struct AsStored {
  long row;
  static constexpr long column = 1, stretch = kDeep, next = kDeep;
};

template <int R, typename Lies>
void tile(Lies lies, const float* x, const float* panel, long k, float* sums, bool fresh) {
  Floats totals[R][2] = {};
  for (long begin = 0; begin < k; begin += lies.stretch, x += lies.next) {
    long end = k - begin < lies.stretch ? k - begin : lies.stretch;
    for (long at = 0; at < end; at++, panel += kWide) {
      Floats left = load<Floats>(panel), right = load<Floats>(panel + kLanes);
      // One long stream, which may come from far.
      if (lies.column > 1) __builtin_prefetch(x + (at + kAhead) * lies.column);
      QG_UNROLLED
      for (int r = 0; r < R; r++) {
        Floats own = all(x[r * lies.row + at * lies.column]);
        totals[r][0] += own * left;
        totals[r][1] += own * right;
      }
    }
  }
  QG_UNROLLED
  for (int r = 0; r < R; r++)
    QG_UNROLLED
    for (int j = 0; j < 2; j++) {
      float* to = sums + r * kWide + j * kLanes;
      store(to, fresh ? totals[r][j] : load<Floats>(to) + totals[r][j]);
    }
}

template <int R = kTall, typename Lies>
void of_rows(int rows, Lies lies, const float* x, const float* panel, long k, float* sums,
             bool fresh) {
  if constexpr (R > 1)
    if (rows < R) return of_rows<R - 1>(rows, lies, x, panel, k, sums, fresh);
  tile<R>(lies, x, panel, k, sums, fresh);
}

}  // namespace

void add_tile(int rows, const float* x, const float* panel, long k, float* sums, bool fresh) {
  of_rows(rows, InStretches{}, x, panel, k, sums, fresh);
}

void stretch_rows(int dtype, const char* x, long row, long column, long rows, long k, float* to) {
  long size = size_of(dtype);
  for (long at = 0; at < k; at += kStretch, to += kTall * kStretch) {
    long some = k - at < kStretch ? k - at : kStretch;
    for (long r = 0; r < rows; r++)
      widen(dtype, x + (r * row + at * column) * size, column, to + r * kStretch, some);
  }
}

namespace {

class Panels : public Product {
 public:
  explicit Panels(const qg_matmul& args)
      : Product(args),
        shape_{args, groups()},
        near_(a.x.dtype == QG_F32 && a.x_column == 1 && a.m * a.k * 4 <= kNear),
        blocks_(over(a.m, kTall)),
        tall_(over(a.m, blocks_)),
        block_floats_(up(kTall * a.k + kLanes, 16)),
        deep_(a.k < kDeep ? a.k : kDeep) {}

  int stages() const override { return 2; }

  long tasks(int stage, int threads) const override {
    if (stage == 0) return near_ ? 0 : entries_ * blocks_;
    return entries_ * over(blocks_, together(threads)) * over(a.n, kWide);
  }

  long shared_bytes() const override {
    return near_ ? 0 : entries_ * blocks_ * block_floats_ * (long)sizeof(float);
  }

  bool begins_like(const Work& other) const override {
    auto* product = dynamic_cast<const Panels*>(&other);
    return product && !near_ && same_rows(*product);
  }

  long own_bytes() const override {
    long sums = together(1) * kTall * kWide * (gated() ? 2 : 1);
    return (deep_ * kWide + sums + panel_room(shape_)) * (long)sizeof(float);
  }

  void run(const Here& here, int stage, long task) const override {
    float* x = (float*)here.shared;
    if (stage == 0) {
      long first = task % blocks_ * tall_, rows = a.m - first < tall_ ? a.m - first : tall_;
      const char* from = matrices(here, task / blocks_).x + first * a.x_row * size_of(a.x.dtype);
      return pack_rows(a.x.dtype, from, a.x_row, a.x_column, rows, a.k, x + task * block_floats_);
    }
    long most = together(here.threads), panels = over(a.n, kWide), parts = over(blocks_, most);
    long first = task % panels * kWide, part = task / panels % parts, entry = task / panels / parts;
    Matrices at = matrices(here, entry);
    long begin = part * most * tall_, all = most * tall_;
    long rows = a.m - begin < all ? a.m - begin : all;
    if (near_) x = (float*)at.x + begin * a.x_row;
    else x += (entry * blocks_ + part * most) * block_floats_;
    float *panel = (float*)here.own, *sums = panel + deep_ * kWide, *room = sums + all * kWide;
    float* sums2 = gated() ? room : nullptr;
    if (sums2) room += all * kWide;
    multiply(at.w, a.w, first, rows, x, panel, sums, room);
    if (sums2) multiply(at.w2, a.w2, first, rows, x, panel, sums2, room);
    long count = a.n - first < kWide ? a.n - first : kWide;
    finish(here, at, begin, rows, first, sums, sums2, kWide, count);
  }

 private:
  static constexpr long kMostBlocks = 560 / kTall;

  // Blocks of rows for which a panel is filled once: as many as leave tasks for all threads.
  long together(int threads) const {
    long parts = over(blocks_, kMostBlocks), panels = entries_ * over(a.n, kWide);
    while (threads > 1 && parts * panels < 3 * threads && 4 * parts < blocks_) parts++;
    return over(blocks_, parts);
  }

  void multiply(const Matrices::Weight& w, const qg_weight& refs, long first, long rows,
                const float* x, float* panel, float* sums, float* room) const {
    for (long k = 0; k < a.k; k += kDeep) {
      long end = k + kDeep < a.k ? k + kDeep : a.k;
      fill_panel(shape_, w, refs, first, k, end, panel, room);
      for (long i = 0; i < rows; i += tall_) {
        int some = (int)(rows - i < tall_ ? rows - i : tall_);
        float* to = sums + i * kWide;
        if (near_) {
          of_rows(some, AsStored{a.x_row}, x + i * a.x_row + k, panel, end - k, to, k == 0);
        } else {
          const float* block = x + i / tall_ * block_floats_ + k * kTall;
          of_rows(some, InColumns{}, block, panel, end - k, to, k == 0);
        }
      }
    }
    if (a.k == 0) std::memset(sums, 0, rows * kWide * sizeof(float));
  }

  PanelShape shape_;
  bool near_;    // are rows read where they lie?
  long blocks_;  // of rows,
  long tall_;    // each of so many: 16 are 8 and 8, since a tile of 2 would wait for its sums
  long block_floats_, deep_;
};

}  // namespace

Maker panels(const qg_matmul& args) { return Maker(new Panels(args)); }

}  // namespace qgraph
