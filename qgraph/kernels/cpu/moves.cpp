// Elements moved as they are: views made arrays, slices at positions, rows by index, sorted rows.

#include <algorithm>
#include <vector>

#include "codes.hpp"
#include "walks.hpp"

namespace qgraph {
namespace {

// Calls `f` with an unsigned type of so many bytes.
template <typename F>
void of_size(long size, F f) {
  if (size == 1) f(uint8_t{});
  else if (size == 2) f(uint16_t{});
  else if (size == 4) f(uint32_t{});
  else f(uint64_t{});
}

class Copy : public Work {
 public:
  Copy(const Table& table, const qg_copy& args) : a(args) {
    if (a.x.rank != a.y.rank || a.x.rank < 0 || a.x.rank > QG_RANK)
      throw Mistake("views of %ld and %ld axes", (long)a.x.rank, (long)a.y.rank);
    for (long i = 0; i < a.x.rank; i++)
      if (a.x.shape[i] != a.y.shape[i]) throw Mistake("shapes differ at axis %ld", i);
    size_ = size_of(a.x.at.dtype);
    if (size_ != size_of(a.y.at.dtype)) throw Mistake("elements of %ld bytes become others", size_);
    check(table, "x", a.x, a.x_starts);
    check(table, "y", a.y, a.y_starts);
    count_ = product_of(a.x.rank, a.x.shape);
    for (long i = 0; i < a.x.rank; i++) join(i);
    inner_ = rank_ ? shape_[rank_ - 1] : 1;
  }

  long tasks(int, int threads) const override { return count_ ? over(count_, part(threads)) : 0; }

  void run(const Here& here, int, long task) const override {
    long begin = task * part(here.threads), end = begin + part(here.threads);
    if (end > count_) end = count_;
    const char* x = here(a.x.at) + start(here, a.x_starts) * size_;
    char* y = here(a.y.at) + start(here, a.y_starts) * size_;
    long step_x = rank_ ? x_[rank_ - 1] : 0, step_y = rank_ ? y_[rank_ - 1] : 0;
    while (begin < end) {
      long some = inner_ - begin % inner_;
      if (some > end - begin) some = end - begin;
      const char* from = x + offset_of(begin, rank_, shape_, x_) * size_;
      char* to = y + offset_of(begin, rank_, shape_, y_) * size_;
      if (step_x == 1 && step_y == 1) {
        std::memcpy(to, from, some * size_);
      } else {
        of_size(size_, [&](auto type) {
          using T = decltype(type);
          for (long i = 0; i < some; i++) ((T*)to)[i * step_y] = ((const T*)from)[i * step_x];
        });
      }
      begin += some;
    }
  }

 private:
  long part(int threads) const { return part_of(count_, 16000 / size_, threads); }

  void join(long axis) {
    long size = a.x.shape[axis], x = a.x.strides[axis], y = a.y.strides[axis];
    if (size == 1) return;
    if (rank_ && x_[rank_ - 1] == x * size && y_[rank_ - 1] == y * size) {
      shape_[rank_ - 1] *= size;
    } else {
      shape_[rank_++] = size;
    }
    x_[rank_ - 1] = x, y_[rank_ - 1] = y;
  }

  // The view must lie within its buffer wherever it may start.
  void check(const Table& table, const char* name, const qg_view& view,
             const qg_start* starts) const {
    int64_t shape[2 * QG_RANK], strides[2 * QG_RANK];
    long rank = 0;
    for (long i = 0; i < view.rank; i++)
      shape[rank] = view.shape[i], strides[rank++] = view.strides[i];
    for (long i = 0; i < QG_RANK; i++) {
      if (!given(starts[i].index)) continue;
      table.is_integer("a start", starts[i].index);
      table.holds("a start", starts[i].index, 1);
      shape[rank] = starts[i].limit + 1, strides[rank++] = starts[i].stride;
    }
    table.holds(name, view.at, rank, shape, strides);
  }

  static long start(const Here& here, const qg_start* starts) {
    long at = 0;
    for (long i = 0; i < QG_RANK; i++) {
      if (!given(starts[i].index)) continue;
      int64_t index = integer_at(starts[i].index.dtype, here(starts[i].index));
      at += starts[i].stride * std::clamp<int64_t>(index, 0, starts[i].limit);
    }
    return at;
  }

  const qg_copy a;
  long size_, count_, inner_, rank_ = 0;
  int64_t shape_[QG_RANK], x_[QG_RANK], y_[QG_RANK];
};

class Take : public Work {
 public:
  Take(const Table& table, const qg_take& args) : a(args) {
    if (a.outer < 0 || a.length < 0 || a.inner < 0 || a.count < 0) throw Mistake("a negative size");
    table.is_integer("indices", a.indices);
    table.holds("indices", a.indices, a.count);
    table.holds("y", a.y, a.outer * a.count * a.inner);
    if (a.length == 0 && a.count && a.outer) throw Mistake("it takes from nothing");
    if (a.mode == QG_DENSE) {
      table.holds("x", a.x, a.outer * a.length * a.inner);
      if (size_of(a.x.dtype) != size_of(a.y.dtype)) throw Mistake("y's elements are not of x's size");
      return;
    }
    qg_ref bytes = a.x;
    bytes.dtype = QG_U8;
    if (!of_code(a.mode, a.bits, [](auto) {}) || a.outer != 1 || a.group < 16 || a.inner % a.group)
      throw Mistake("no packed rows have mode %ld, %ld bits and groups of %ld", (long)a.mode,
                    (long)a.bits, (long)a.group);
    table.is_float("y", a.y);
    table.holds("x", bytes, a.length * (a.inner * a.bits / 8));
    if (a.mode == QG_AFFINE) table.is_float("scales", a.scales);
    for (const auto* ref : {&a.scales, &a.biases})
      if (a.mode == QG_AFFINE || ref == &a.scales)
        table.holds("scales or biases", *ref, a.length * (a.inner / a.group));
  }

  long tasks(int, int threads) const override {
    long rows = a.outer * a.count;
    return rows && a.inner ? over(rows, part(threads)) : 0;
  }

  void run(const Here& here, int, long task) const override {
    long begin = task * part(here.threads), end = begin + part(here.threads);
    for (long i = begin; i < end && i < a.outer * a.count; i++) {
      int64_t at = integer_at(a.indices.dtype,
                              here(a.indices) + i % a.count * size_of(a.indices.dtype));
      if (at < 0) at += a.length;
      at = std::clamp<int64_t>(at, 0, a.length - 1);
      char* y = here(a.y) + i * a.inner * size_of(a.y.dtype);
      if (a.mode == QG_DENSE) {
        long bytes = a.inner * size_of(a.x.dtype);
        std::memcpy(y, here(a.x) + (i / a.count * a.length + at) * bytes, bytes);
      } else {
        of_code(a.mode, a.bits, [&](auto code) { decode(code, here, at, y); });
      }
    }
  }

 private:
  long part(int threads) const {
    return part_of(a.outer * a.count, 8000 / (a.inner + 1) + 1, threads);
  }

  template <typename Code>
  void decode(const Code& code, const Here& here, long row, char* y) const {
    long bytes = a.inner * a.bits / 8, groups = a.inner / a.group;
    const uint8_t* codes = here.at<const uint8_t>(a.x) + row * bytes;
    float out[kLanes], scale[kLanes], bias[kLanes], scales[kLanes] = {}, biases[kLanes] = {};
    for (long j = 0; j < a.inner; j += kLanes) {
      long some = a.inner - j < kLanes ? a.inner - j : kLanes;
      Words low{};
      for (long i = 0; i < some; i++) {
        long bit = (j + i) * Code::kBits, byte = bit / 8;
        uint32_t two = codes[byte] | (byte + 1 < bytes ? codes[byte + 1] << 8 : 0);
        low[i] = two >> (bit % 8);
      }
      store(out, code.value(low) + Code::kCentre);
      for (long i = 0; i < some; i++) {
        long group = row * groups + (j + i) / a.group;
        if (i == 0 || (j + i) % a.group == 0) scale_at(here, group, scale, bias);
        scales[i] = scale[0], biases[i] = bias[0];
      }
      Floats x = load<Floats>(out) * load<Floats>(scales);
      if (a.y.dtype != QG_F32) x = rounded(a.y.dtype, x);  // as MLX does, in the dtype of y
      store(out, x + load<Floats>(biases));
      narrow(a.y.dtype, out, y + j * size_of(a.y.dtype), 1, some);
    }
  }

  void scale_at(const Here& here, long group, float* scale, float* bias) const {
    bias[0] = 0;
    of_scale(a.mode, a.scales.dtype, [&](auto d) {
      using D = decltype(d);
      using Stored = typename D::Stored;
      store(scale, load_part<D>(here.at<const Stored>(a.scales) + group, 1, nullptr));
      if (a.mode == QG_AFFINE)
        store(bias, load_part<D>(here.at<const Stored>(a.biases) + group, 1, nullptr));
    });
  }

  const qg_take a;
};

class TakeAlong : public RowWork {
 public:
  TakeAlong(const Table& table, const qg_take_along& args)
      : RowWork(table, args.rows, args.put ? args.rows.length : args.x_length,
                args.put ? args.y_length : args.rows.length),
        t(args) {
    table.is_integer("indices", t.indices);
    check(table, "indices", t.indices, t.index_strides, t.index_axis, r.length);
    if (size_of(r.x.dtype) != size_of(r.y.dtype)) throw Mistake("y's elements are not of x's size");
    if (length() == 0 && count_) throw Mistake("it takes from nothing");
  }

 protected:
  void row(const Here& here, long number, const char* x, char* y) const override {
    long size = size_of(t.indices.dtype), each = size_of(r.x.dtype);
    const char* indices =
        here(t.indices) + offset_of(number, r.rank, r.shape, t.index_strides) * size;
    for (long i = 0; i < r.length; i++) {
      int64_t at = integer_at(t.indices.dtype, indices + i * t.index_axis * size);
      if (at < 0) at += length();
      at = std::clamp<int64_t>(at, 0, length() - 1);
      long from = t.put ? i : at, to = t.put ? at : i;
      std::memcpy(y + to * r.y_axis * each, x + from * r.x_axis * each, each);
    }
  }

 private:
  long length() const { return t.put ? t.y_length : t.x_length; }

  const qg_take_along t;
};

class Sort : public RowWork {
 public:
  Sort(const Table& table, const qg_sort& args)
      : RowWork(table, args.rows, args.rows.length, kept_of(args)), s(args) {
    int wanted = s.arguments ? (int)QG_U32 : r.x.dtype;
    table.one_of("y", r.y, r.y.dtype == wanted, s.arguments ? "uint32" : "of x's dtype");
    if (r.length > UINT32_MAX) throw Mistake("rows are too long");
    if (s.part && (s.at < 0 || s.at >= r.length)) throw Mistake("element %ld is none", (long)s.at);
  }

  long own_bytes() const override { return r.length * (long)(sizeof(Key) + 8); }

 protected:
  struct Key {
    int64_t value;
    uint32_t number;
    bool operator<(const Key& other) const {
      return value != other.value ? value < other.value : number < other.number;
    }
  };

  long cost() const override { return s.part ? 150 : 400; }

  void row(const Here& here, long, const char* x, char* y) const override {
    Key* keys = (Key*)here.own;
    long size = size_of(r.x.dtype), kept = kept_of(s);
    for (long i = 0; i < r.length; i++)
      keys[i] = {ordered(x + i * r.x_axis * size), (uint32_t)i};
    if (s.part) std::nth_element(keys, keys + s.at, keys + r.length);
    else if (kept < r.length) std::partial_sort(keys, keys + kept, keys + r.length);
    else std::sort(keys, keys + r.length);
    for (long i = 0; i < kept; i++) {
      if (s.arguments) *(uint32_t*)(y + i * r.y_axis * 4) = keys[i].number;
      else std::memcpy(y + i * r.y_axis * size, x + keys[i].number * r.x_axis * size, size);
    }
  }

 private:
  static long kept_of(const qg_sort& args) {
    long kept = args.kept ? args.kept : args.rows.length;
    if (kept < 0 || kept > args.rows.length) throw Mistake("it keeps %ld", kept);
    return kept;
  }

  // A number in the order of the elements.
  int64_t ordered(const char* from) const {
    if (r.x.dtype == QG_U64) return (int64_t)(load<uint64_t>(from) ^ (1ull << 63));
    if (!is_float(r.x.dtype)) return integer_at(r.x.dtype, from);
    float v;
    widen(r.x.dtype, from, 1, &v, 1);
    if (v != v) return INT64_MAX;
    int32_t bits = load<int32_t>(&(v += 0.0f));  // -0 is 0
    return bits < 0 ? -(int64_t)(bits & 0x7fffffff) : bits;
  }

  const qg_sort s;
};

}  // namespace

Maker make_copy(const Table& table, long args) {
  return Maker(new Copy(table, *table.args<qg_copy>(args)));
}
Maker make_take(const Table& table, long args) {
  return Maker(new Take(table, *table.args<qg_take>(args)));
}
Maker make_take_along(const Table& table, long args) {
  return Maker(new TakeAlong(table, *table.args<qg_take_along>(args)));
}
Maker make_sort(const Table& table, long args) {
  return Maker(new Sort(table, *table.args<qg_sort>(args)));
}

}  // namespace qgraph
