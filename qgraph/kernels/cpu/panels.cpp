// Products of many rows, at the rate of the machine's multiplications.
//
// A task takes some rows of x and the columns of a few panels.  It fills a panel of the weight, a
// stretch of k at a time, and runs tiles of up to kTall rows over it, whose sums stay in registers;
// the last stretch's are finished tile by tile, while they are near.  Rows that fit a core's cache
// are read where they lie: packed by two threads they would come from the other core's cache, and
// there is one barrier less.  Asking ahead for the next panel, or for y, costs more than it hides.

#include "panels.hpp"

namespace qgraph {
namespace {

constexpr long kAhead = 24;  // columns of x that are fetched before they are read
constexpr long kManyRows = 128;  // fewer stay in the cache beside the panels anyway
constexpr long kNear = 512 << 10;  // bytes of x that stay in a core's cache beside a panel

// Where the rows of x for a tile lie: `row` and `column` elements from one to the next, `stretch`
// columns side by side and `next` elements from stretch to stretch.
struct InStretches {
  static constexpr long row = kStretch, column = 1, stretch = kStretch, next = kTall * kStretch;
};
struct InColumns {
  static constexpr long row = 1, column = kTall, stretch = kDeep, next = kTall * kDeep;
};
struct AsStored {
  long row;
  static constexpr long column = 1, stretch = kDeep, next = kDeep;
};

template <int R, typename Lies>
void tile(Lies lies, const float* x, const float* panel, long k, float* sums, long step,
          bool fresh) {
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
      float* to = sums + r * step + j * kLanes;
      store(to, fresh ? totals[r][j] : load<Floats>(to) + totals[r][j]);
    }
}

template <int R = kTall, typename Lies>
void of_rows(int rows, Lies lies, const float* x, const float* panel, long k, float* sums,
             long step, bool fresh) {
  if constexpr (R > 1)
    if (rows < R) return of_rows<R - 1>(rows, lies, x, panel, k, sums, step, fresh);
  tile<R>(lies, x, panel, k, sums, step, fresh);
}

}  // namespace

void add_tile(int rows, const float* x, const float* panel, long k, float* sums, long step,
              bool fresh) {
  of_rows(rows, InStretches{}, x, panel, k, sums, step, fresh);
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
    return entries_ * over(blocks_, together(threads)) * over(a.n, wide(threads));
  }

  long shared_bytes() const override {
    return near_ ? 0 : entries_ * blocks_ * block_floats_ * (long)sizeof(float);
  }

  bool begins_like(const Work& other) const override {
    auto* product = dynamic_cast<const Panels*>(&other);
    return product && !near_ && same_rows(*product);
  }

  long own_bytes() const override {
    return (deep_ * kWide + sums_floats() * (gated() ? 2 : 1) + panel_room(shape_)) *
           (long)sizeof(float);
  }

  void run(const Here& here, int stage, long task) const override {
    float* x = (float*)here.shared;
    if (stage == 0) {
      long first = task % blocks_ * tall_, rows = a.m - first < tall_ ? a.m - first : tall_;
      const char* from = matrices(here, task / blocks_).x + first * a.x_row * size_of(a.x.dtype);
      return pack_rows(a.x.dtype, from, a.x_row, a.x_column, rows, a.k, x + task * block_floats_);
    }
    long most = together(here.threads), across = wide(here.threads);
    long stripes = over(a.n, across), parts = over(blocks_, most);
    long part = task / stripes % parts, entry = task / stripes / parts;
    Stripe s{here, matrices(here, entry), part * most * tall_, 0, task % stripes * across, 0, x};
    s.rows = a.m - s.row < most * tall_ ? a.m - s.row : most * tall_;
    s.end = a.n - s.first < across ? a.n : s.first + across;
    if (near_) s.x = (float*)s.at.x + s.row * a.x_row;
    else s.x += (entry * blocks_ + part * most) * block_floats_;
    multiply(s);
  }

 private:
  static constexpr long kMostBlocks = 560 / kTall;
  static constexpr long kMostPanels = 4;  // of a task

  // What a task makes of y: rows from `row` on, columns from `first` to `end`.
  struct Stripe {
    const Here& here;
    Matrices at;
    long row, rows, first, end;
    const float* x;
  };

  // A panel of it, to which a stretch of k is added.
  struct Piece {
    long column, begin, end;
    bool second;  // of w2
  };

  // Blocks of rows for which a panel is filled once: as many as leave tasks for all threads.
  long together(int threads) const {
    long parts = over(blocks_, kMostBlocks), panels = entries_ * over(a.n, kWide);
    while (threads > 1 && parts * panels < 3 * threads && 4 * parts < blocks_) parts++;
    return over(blocks_, parts);
  }

  // Columns of a task.  Many rows do not stay in the cache for all of k: what is fetched of them
  // serves some panels.
  long wide(int threads) const {
    long most = together(threads), parts = over(blocks_, most), panels = over(a.n, kWide);
    long some = most * tall_ < kManyRows ? 1 : kMostPanels;
    while (threads > 1 && some > 1 && entries_ * parts * over(panels, some) < 3 * threads) some--;
    return some * kWide;
  }

  // Sums of a task: of all its panels, if they wait for more of k.
  long sums_floats() const {
    return together(1) * tall_ * kWide * (a.k > kDeep ? kMostPanels : 1);
  }

  Piece piece(const Stripe& s, long number) const {
    long each = gated() ? 2 : 1, panels = over(s.end - s.first, kWide);
    long begin = number / each / panels * kDeep;
    return {s.first + number / each % panels * kWide, begin,
            a.k - begin < kDeep ? a.k : begin + kDeep, number % each > 0};
  }

  void multiply(const Stripe& s) const {
    float *panel = (float*)s.here.own, *all = panel + deep_ * kWide, *all2 = all + sums_floats();
    float* room = gated() ? all2 + sums_floats() : all2;
    long pieces = over(a.k ? a.k : 1, kDeep) * over(s.end - s.first, kWide) * (gated() ? 2 : 1);
    for (long number = 0; number < pieces; number++) {
      Piece p = piece(s, number);
      fill_panel(shape_, p.second ? s.at.w2 : s.at.w, p.second ? a.w2 : a.w, p.column, p.begin,
                 p.end, panel, room);
      long own = a.k > kDeep ? (p.column - s.first) * s.rows : 0;
      long count = s.end - p.column < kWide ? s.end - p.column : kWide;
      bool ends = p.end == a.k && p.second == gated();
      for (long i = 0; i < s.rows; i += tall_) {
        int some = (int)(s.rows - i < tall_ ? s.rows - i : tall_);
        float* sums = (p.second ? all2 : all) + own + i * kWide;
        if (near_)
          of_rows(some, AsStored{a.x_row}, s.x + i * a.x_row + p.begin, panel, p.end - p.begin,
                  sums, kWide, p.begin == 0);
        else
          of_rows(some, InColumns{}, s.x + i / tall_ * block_floats_ + p.begin * kTall, panel,
                  p.end - p.begin, sums, kWide, p.begin == 0);
        if (ends)
          finish(s.here, s.at, s.row + i, some, p.column, all + own + i * kWide,
                 gated() ? all2 + own + i * kWide : nullptr, kWide, count);
      }
    }
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
