// Attention: keys block by block, softmax corrected as larger scores come (Milakov and Gimelshein,
// "Online normalizer calculation for softmax", 2018).
//
// Query rows of the heads that share a key head stand together: `row` is query * shared + head.  A
// few rows read keys and values as they lie; many go through panels, as products do.

#include "functions.hpp"
#include "panels.hpp"

namespace qgraph {
namespace {

constexpr long kFewRows = 7;
constexpr long kFewKeys = 64;   // of a block
constexpr long kRowsOfTask = 5 * kTall;  // 64 rows are one task
constexpr float kHidden = -3.4028234663852886e38f;  // as masks of bool hide in MLX

// The keys that a query sees.  None: all of them, with equal weights.
struct Range {
  long begin, end;
  bool none;
};

// Sums of kLanes vectors, each in a lane.
template <int count>
Floats sums_of(const Floats* v) {
  if constexpr (count == 1) {
    return v[0];
  } else {
    return pairs(sums_of<count / 2>(v), sums_of<count / 2>(v + count / 2));
  }
}

class Attention : public Work {
 public:
  Attention(const Table& table, const qg_attention& args) : a(args) {
    if (a.kv_heads < 1 || a.heads % a.kv_heads) throw Mistake("%ld heads share %ld", (long)a.heads, (long)a.kv_heads);
    if (a.batch < 0 || a.queries < 0 || a.keys < 1 || a.dim < 1 || a.value_dim < 1)
      throw Mistake("a size of it is not positive");
    if (a.window < 0 || (a.window && !a.causal && !given(a.last)))
      throw Mistake("a window wants causal or last");
    holds(table, "q", a.q, a.q_strides, a.heads, a.queries, a.dim);
    holds(table, "k", a.k, a.k_strides, a.kv_heads, a.keys, a.dim);
    holds(table, "v", a.v, a.v_strides, a.kv_heads, a.keys, a.value_dim);
    holds(table, "y", a.y, a.y_strides, a.heads, a.queries, a.value_dim);
    position(table, "last", a.last, a.last_batch);
    position(table, "first", a.first, a.first_batch);
    if (given(a.mask)) {
      int64_t shape[] = {a.batch, a.heads, a.queries, a.keys};
      table.one_of("mask", a.mask, a.mask.dtype == QG_BOOL || is_float(a.mask.dtype), "bool or float");
      table.holds("mask", a.mask, 4, shape, a.mask_strides);
    }
    if (given(a.sinks)) {
      table.is_float("sinks", a.sinks);
      table.holds("sinks", a.sinks, a.heads);
    }
    shared_ = a.heads / a.kv_heads;
    rows_ = shared_ * a.queries;
    few_ = rows_ <= kFewRows;
    block_ = few_ ? kFewKeys : kStretch;
    of_task_ = few_ || !rows_ ? rows_ : over(rows_, over(rows_, kRowsOfTask));
    long heads = a.batch * a.kv_heads;
    if (few_ && heads > 0 && heads < 64) {
      splits_ = over(a.keys, 4 * kFewKeys);
      if (splits_ > 64 / heads) splits_ = over(64, heads);
      if (splits_ < 1) splits_ = 1;
    }
    deep_ = up(a.dim, kLanes), wide_ = up(a.value_dim, kWide);
  }

  int stages() const override { return splits_ > 1 ? 2 : 1; }

  long tasks(int stage, int) const override {
    long heads = a.batch * a.kv_heads;
    if (!rows_) return 0;
    return stage ? heads : heads * over(rows_, of_task_) * splits_;
  }

  long shared_bytes() const override {
    return splits_ > 1 ? a.batch * a.kv_heads * splits_ * part_floats() * (long)sizeof(float) : 0;
  }

  long own_bytes() const override {
    long rows = up(of_task_, kTall);
    long queries = few_ ? rows * deep_ : rows * up(a.dim, kStretch);
    long blocks = few_ ? block_ * (deep_ + wide_) : (a.dim > block_ ? a.dim : block_) * kWide;
    long scores = rows * block_ + 2 * up(rows, 16) + rows * wide_;
    return (queries + blocks + scores + 64) * (long)sizeof(float);
  }

  void run(const Here& here, int stage, long task) const override {
    if (stage) return merge(here, task);
    long parts = over(rows_, of_task_), split = task % splits_, part = task / splits_ % parts;
    long head = task / splits_ / parts;
    Rows rows = start(here, head, part * of_task_);
    long begin = a.keys, end = 0;
    for (long r = 0; r < rows.count; r++) {
      Range range = seen(here, rows.batch, query(rows, r));
      if (range.begin < begin) begin = range.begin;
      if (range.end > end) end = range.end;
    }
    if (splits_ > 1) {  // whole blocks each
      long all = over(end - begin, block_), first = begin;
      begin = first + all * split / splits_ * block_;
      long stop = first + all * (split + 1) / splits_ * block_;
      if (stop < end) end = stop;
    }
    for (; begin < end; begin += block_)
      block(here, rows, begin, end - begin < block_ ? end - begin : block_);
    if (splits_ == 1) return finish(here, rows, rows.sums, rows.most, rows.totals);
    float* to = (float*)here.shared + (head * splits_ + split) * part_floats();
    std::memcpy(to, rows.most, rows_ * sizeof(float));
    std::memcpy(to + rows_, rows.totals, rows_ * sizeof(float));
    std::memcpy(to + 2 * rows_, rows.sums, rows_ * wide_ * sizeof(float));
  }

 private:
  struct Rows {
    long batch, head, first, count;  // head: of the keys; first: row
    float *queries, *keys, *values, *scores, *most, *totals, *sums;
  };

  const qg_attention a;
  long shared_, rows_, block_, of_task_, splits_ = 1, deep_, wide_;
  bool few_;

  long part_floats() const { return up(rows_ * (wide_ + 2), 16); }
  long query(const Rows& rows, long r) const { return (rows.first + r) / shared_; }
  long head_of(const Rows& rows, long r) const {
    return rows.head * shared_ + (rows.first + r) % shared_;
  }

  void holds(const Table& table, const char* name, const qg_ref& ref, const int64_t* strides,
             long heads, long length, long dim) const {
    int64_t shape[] = {a.batch, heads, length, dim};
    table.is_float(name, ref);
    table.holds(name, ref, 4, shape, strides);
  }

  void position(const Table& table, const char* name, const qg_ref& ref, int64_t stride) const {
    if (!given(ref)) return;
    table.is_integer(name, ref);
    table.holds(name, ref, 1, &a.batch, &stride);
  }

  Range seen(const Here& here, long batch, long query) const {
    int64_t begin = 0, end = a.keys;
    if (a.causal && !given(a.last)) end = query + 1 + a.keys - a.queries;
    if (given(a.last)) {
      int64_t last = at_batch(here, a.last, batch * a.last_batch);
      if (last > a.keys + a.queries) last = a.keys + a.queries;
      end = last < 0 ? 0 : last + query - (a.queries - 1) + 1;
    }
    if (a.window) begin = end - a.window;
    if (given(a.first)) {
      int64_t first = at_batch(here, a.first, batch * a.first_batch);
      if (first > begin) begin = first;
    }
    if (begin < 0) begin = 0;
    if (end > a.keys) end = a.keys;
    if (begin >= end) return {0, a.keys, true};
    return {begin, end, false};
  }

  static int64_t at_batch(const Here& here, const qg_ref& ref, long at) {
    return integer_at(ref.dtype, here(ref) + at * size_of(ref.dtype));
  }

  const char* element(const Here& here, const qg_ref& ref, const int64_t* strides, long batch,
                      long head, long at) const {
    return here(ref) + (batch * strides[0] + head * strides[1] + at * strides[2]) * size_of(ref.dtype);
  }

  Rows start(const Here& here, long head, long first) const {
    long most = up(of_task_, kTall);
    Rows rows{head / a.kv_heads, head % a.kv_heads, first,
              rows_ - first < of_task_ ? rows_ - first : of_task_, (float*)here.own,
              nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    rows.keys = rows.queries + (few_ ? most * deep_ : most * up(a.dim, kStretch));
    rows.values = few_ ? rows.keys + block_ * deep_ : rows.keys;
    rows.scores = few_ ? rows.values + block_ * wide_
                       : rows.keys + (a.dim > block_ ? a.dim : block_) * kWide;
    rows.most = rows.scores + most * block_;
    rows.totals = rows.most + up(most, 16);
    rows.sums = rows.totals + up(most, 16);
    for (long r = 0; r < rows.count; r++) {
      rows.most[r] = -INFINITY, rows.totals[r] = 0;
      const char* q = element(here, a.q, a.q_strides, rows.batch, head_of(rows, r), query(rows, r));
      if (few_) {
        float* to = rows.queries + r * deep_;
        widen(a.q.dtype, q, a.q_strides[3], to, a.dim);
        for (long j = a.dim; j < deep_; j++) to[j] = 0;
      } else {
        float* to = rows.queries + r / kTall * kTall * up(a.dim, kStretch) + r % kTall * kStretch;
        stretch_rows(a.q.dtype, q, 0, a.q_strides[3], 1, a.dim, to);
      }
    }
    std::memset(rows.sums, 0, rows.count * wide_ * sizeof(float));
    return rows;
  }

  // `count` keys from `first` on, for all rows.
  void block(const Here& here, const Rows& rows, long first, long count) const {
    if (few_) few_scores(here, rows, first, count);
    else many_scores(here, rows, first, count);
    float kept[kRowsOfTask];
    for (long r = 0; r < rows.count; r++) kept[r] = soften(here, rows, r, first, count);
    if (few_) few_values(here, rows, first, count, kept);
    else many_values(here, rows, first, count, kept);
  }

  // Scores to weights; what the sums so far are multiplied by.
  float soften(const Here& here, const Rows& rows, long r, long first, long count) const {
    float* s = rows.scores + r * block_;
    Range range = seen(here, rows.batch, query(rows, r));
    float scale = range.none ? 0 : (float)a.scale;
    for (long j = 0; j < count; j += kLanes) store(s + j, load<Floats>(s + j) * scale);
    if (given(a.mask) && !range.none) mask(here, rows, r, first, count, s);
    long begin = range.begin - first, end = range.end - first;
    for (long j = 0; j < begin && j < count; j++) s[j] = -INFINITY;
    for (long j = end > 0 ? end : 0; j < up(count, kLanes); j++) s[j] = -INFINITY;
    for (long j = count; j < up(count, kLanes); j++) s[j] = -INFINITY;
    if (begin >= count || end <= 0) {
      for (long j = 0; j < count; j++) s[j] = 0;
      return 1;
    }
    Floats high = all(rows.most[r]);
    for (long j = 0; j < count; j += kLanes) high = larger(high, load<Floats>(s + j));
    float most = largest(high), shift = most == -INFINITY ? 0 : most;
    Floats total{};
    for (long j = 0; j < count; j += kLanes) {
      Floats e = exponential(load<Floats>(s + j) - shift);
      store(s + j, e);
      total += e;
    }
    float kept = rows.most[r] == -INFINITY ? 0 : exponential(all(rows.most[r] - shift))[0];
    rows.totals[r] = rows.totals[r] * kept + sum(total);
    rows.most[r] = most;
    return kept;
  }

  void mask(const Here& here, const Rows& rows, long r, long first, long count, float* s) const {
    const int64_t* by = a.mask_strides;
    long size = size_of(a.mask.dtype);
    const char* from = here(a.mask) + (rows.batch * by[0] + head_of(rows, r) * by[1] +
                                       query(rows, r) * by[2] + first * by[3]) * size;
    if (a.mask.dtype == QG_BOOL) {
      for (long j = 0; j < count; j += kLanes) {
        Bytes kept{};
        long some = count - j < kLanes ? count - j : kLanes;
        if (some == kLanes && by[3] == 1) kept = load<Bytes>(from + j);
        else for (long i = 0; i < some; i++) kept[i] = from[(j + i) * by[3]];
        auto seen = __builtin_convertvector(kept, Ints) != 0;
        store(s + j, seen ? load<Floats>(s + j) : all(kHidden));
      }
      return;
    }
    float added[kLanes] = {};
    for (long j = 0; j < count; j += kLanes) {
      widen(a.mask.dtype, from + j * by[3] * size, by[3], added, count - j < kLanes ? count - j : kLanes);
      store(s + j, load<Floats>(s + j) + load<Floats>(added));
    }
  }

  // Rows of keys or values as float32 in whole vectors: as they lie, or copied.
  const float* rows_of(const Here& here, const qg_ref& ref, const int64_t* strides, const Rows& rows,
                       long first, long count, long dim, long padded, float* room, long* step) const {
    const char* from = element(here, ref, strides, rows.batch, rows.head, first);
    if (ref.dtype == QG_F32 && strides[3] == 1 && dim == padded) {
      *step = strides[2];
      return (const float*)from;
    }
    for (long j = 0; j < count; j++) {
      widen(ref.dtype, from + j * strides[2] * size_of(ref.dtype), strides[3], room + j * padded, dim);
      for (long i = dim; i < padded; i++) room[j * padded + i] = 0;
    }
    *step = padded;
    return room;
  }

  void few_scores(const Here& here, const Rows& rows, long first, long count) const {
    long step;
    const float* keys =
        rows_of(here, a.k, a.k_strides, rows, first, count, a.dim, deep_, rows.keys, &step);
    for (long j = 0; j < count; j += kLanes) {
      const float* own[kLanes];
      for (int i = 0; i < kLanes; i++) own[i] = keys + (j + i < count ? j + i : count - 1) * step;
      for (long r = 0; r < rows.count; r++) {
        const float* q = rows.queries + r * deep_;
        Floats parts[kLanes] = {};
        for (long d = 0; d < deep_; d += kLanes) {
          Floats x = load<Floats>(q + d);
          QG_UNROLLED
          for (int i = 0; i < kLanes; i++) parts[i] += x * load<Floats>(own[i] + d);
        }
        store(rows.scores + r * block_ + j, sums_of<kLanes>(parts));
      }
    }
  }

  void few_values(const Here& here, const Rows& rows, long first, long count,
                  const float* kept) const {
    long step;
    const float* values = rows_of(here, a.v, a.v_strides, rows, first, count, a.value_dim,
                                  up(a.value_dim, kLanes), rows.values, &step);
    for (long r = 0; r < rows.count; r++) {
      const float* weights = rows.scores + r * block_;
      for (long d = 0; d < up(a.value_dim, kLanes); d += 4 * kLanes) {
        float* sums = rows.sums + r * wide_ + d;
        int vectors = (int)((up(a.value_dim, kLanes) - d) / kLanes);
        if (vectors >= 4) add_values<4>(weights, values + d, step, count, kept[r], sums);
        else
          for (int i = 0; i < vectors; i++)
            add_values<1>(weights, values + d + i * kLanes, step, count, kept[r], sums + i * kLanes);
      }
    }
  }

  template <int vectors>
  static void add_values(const float* weights, const float* values, long step, long count,
                         float kept, float* sums) {
    Floats own[vectors];
    QG_UNROLLED
    for (int i = 0; i < vectors; i++) own[i] = load<Floats>(sums + i * kLanes) * kept;
    for (long j = 0; j < count; j++)
      QG_UNROLLED
      for (int i = 0; i < vectors; i++)
        own[i] += weights[j] * load<Floats>(values + j * step + i * kLanes);
    QG_UNROLLED
    for (int i = 0; i < vectors; i++) store(sums + i * kLanes, own[i]);
  }

  // Keys (or values) as the weight of a product: rows or columns of y.
  PanelShape shape(long n, long k, long row, long column) const {
    PanelShape shape{};
    shape.a.n = n, shape.a.k = k, shape.a.w_row = row, shape.a.w_column = column;
    return shape;
  }

  void many_scores(const Here& here, const Rows& rows, long first, long count) const {
    PanelShape keys = shape(count, a.dim, a.k_strides[2], a.k_strides[3]);
    Matrices::Weight from;
    from.codes = element(here, a.k, a.k_strides, rows.batch, rows.head, first);
    for (long j = 0; j < count; j += kWide) {
      fill_panel(keys, from, {a.k, {}, {}}, j, 0, a.dim, rows.keys, nullptr);
      for (long r = 0; r < rows.count; r += kTall) {
        int some = (int)(rows.count - r < kTall ? rows.count - r : kTall);
        add_tile(some, rows.queries + r * up(a.dim, kStretch), rows.keys, a.dim,
                 rows.scores + r * block_ + j, block_, true);
      }
    }
  }

  void many_values(const Here& here, const Rows& rows, long first, long count,
                   const float* kept) const {
    PanelShape values = shape(a.value_dim, count, a.v_strides[3], a.v_strides[2]);
    Matrices::Weight from;
    from.codes = element(here, a.v, a.v_strides, rows.batch, rows.head, first);
    for (long r = 0; r < rows.count; r++)
      for (long d = 0; d < wide_; d += kLanes) {
        float* sums = rows.sums + r * wide_ + d;
        store(sums, load<Floats>(sums) * kept[r]);
      }
    for (long d = 0; d < a.value_dim; d += kWide) {
      fill_panel(values, from, {a.v, {}, {}}, d, 0, count, rows.keys, nullptr);
      for (long r = 0; r < rows.count; r += kTall) {
        int some = (int)(rows.count - r < kTall ? rows.count - r : kTall);
        add_tile(some, rows.scores + r * block_, rows.keys, count, rows.sums + r * wide_ + d, wide_,
                 false);
      }
    }
  }

  void merge(const Here& here, long head) const {
    Rows rows{head / a.kv_heads, head % a.kv_heads, 0, rows_,
              nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    float* parts = (float*)here.shared + head * splits_ * part_floats();
    for (long r = 0; r < rows_; r++) {
      float most = -INFINITY, total = 0;
      for (long s = 0; s < splits_; s++) {
        float own = parts[s * part_floats() + r];
        if (own > most) most = own;
      }
      float *sums = parts + 2 * rows_ + r * wide_, first = 1;
      for (long s = 0; s < splits_; s++) {
        float* part = parts + s * part_floats();
        float kept = part[r] == -INFINITY ? 0 : exponential(all(part[r] - most))[0];
        total += part[rows_ + r] * kept;
        if (part[rows_ + r] != part[rows_ + r]) total = part[rows_ + r];
        const float* own = part + 2 * rows_ + r * wide_;
        if (s == 0) first = kept;
        for (long d = 0; d < wide_; d += kLanes)
          store(sums + d, s == 0 ? load<Floats>(own + d) * first
                                 : load<Floats>(sums + d) + load<Floats>(own + d) * kept);
      }
      parts[r] = most;
      parts[rows_ + r] = total;
    }
    finish(here, rows, parts + 2 * rows_, parts, parts + rows_);
  }

  void finish(const Here& here, const Rows& rows, float* sums, const float* most,
              const float* totals) const {
    for (long r = 0; r < rows.count; r++) {
      float total = totals[r], scale = 1;
      if (given(a.sinks)) {
        float sink;
        long size = size_of(a.sinks.dtype);
        widen(a.sinks.dtype, here(a.sinks) + head_of(rows, r) * size, 1, &sink, 1);
        float high = sink > most[r] ? sink : most[r];
        scale = most[r] == -INFINITY ? 0 : std::exp(most[r] - high);
        total = total * scale + std::exp(sink - high);
      }
      for (long d = 0; d < wide_; d += kLanes)
        store(sums + r * wide_ + d, load<Floats>(sums + r * wide_ + d) * (scale / total));
      char* y = (char*)element(here, a.y, a.y_strides, rows.batch, head_of(rows, r), query(rows, r));
      narrow(a.y.dtype, sums + r * wide_, y, a.y_strides[3], a.value_dim);
    }
  }
};

}  // namespace

Maker make_attention(const Table& table, long args) {
  return Maker(new Attention(table, *table.args<qg_attention>(args)));
}

}  // namespace qgraph
