// Regions of every kind of work run by several callers at once, for sanitizers: built with them and
// all sources of qgraph/kernels/cpu by test_region_engine.py.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "region.h"

namespace {

const qg_ref kNone{-1, 0, 0};

// Steps over buffers that are given to each run.
struct Made {
  std::vector<qg_buffer> buffers;
  std::vector<qg_step> steps;
  std::vector<uint8_t> args;

  qg_ref buffer(int dtype, long bytes) {
    buffers.push_back({QG_GIVEN, 0, (int64_t)buffers.size(), bytes});
    return {(int32_t)buffers.size() - 1, dtype, 0};
  }

  template <typename T>
  long place(const T* data, long count = 1) {
    long at = args.size();
    args.insert(args.end(), (const uint8_t*)data, (const uint8_t*)(data + count));
    return at;
  }

  template <typename T>
  void add(int kind, const T& data, int flags = QG_BARRIER) {
    steps.push_back({kind, flags, place(&data)});
  }

  void* make() {
    qg_region region{QG_VERSION, (int64_t)buffers.size(), (int64_t)steps.size(), (int64_t)args.size(),
                     (int64_t)buffers.size(), 0, 0, buffers.data(), steps.data(), args.data()};
    char words[256] = "";
    void* made = qgraph_region_make(&region, words, sizeof(words));
    if (!made) std::printf("%s\n", words);
    return made;
  }
};

qg_matmul product(qg_ref x, qg_ref w, qg_ref y, long m, long n, long k) {
  qg_matmul a{};
  a.x = x, a.y = y, a.w = {w, kNone, kNone}, a.w2 = {kNone, kNone, kNone};
  a.bias = a.times = a.add = a.lhs = a.rhs = kNone;
  a.m = m, a.n = n, a.k = k, a.alpha = 1;
  a.x_row = a.w_row = k, a.y_row = n, a.x_column = a.w_column = a.y_column = 1;
  return a;
}

qg_elementwise doubled(Made* made, qg_ref x, qg_ref y, long count) {
  qg_elementwise a{};
  a.rank = 1, a.shape[0] = count, a.inputs = a.instructions = a.outputs = 1;
  qg_operand in{x, {1}};
  qg_instruction add{QG_OP_ADD, x.dtype, 0, 0, -1, 0, {}};
  qg_output out{{y, {1}}, 1};
  a.input_at = made->place(&in);
  a.instruction_at = made->place(&add);
  a.output_at = made->place(&out);
  return a;
}

constexpr long kRows = 40, kWide = 96, kKeys = 700, kTurns = 5, kWords = 5001;

qg_rows rows_of(qg_ref x, qg_ref y) {
  qg_rows r{};
  r.x = x, r.y = y, r.rank = 1, r.shape[0] = kRows, r.x_strides[0] = r.y_strides[0] = kWide;
  r.length = kWide, r.x_axis = r.y_axis = 1;
  return r;
}

qg_rows columns_of(qg_ref x, qg_ref y) {
  qg_rows r = rows_of(x, y);
  r.shape[0] = kWide, r.x_strides[0] = r.y_strides[0] = 1;
  r.length = kRows, r.x_axis = r.y_axis = kWide;
  return r;
}

qg_reduce reduction(qg_ref x, qg_ref y, int op, bool columns) {
  qg_reduce r{};
  r.x = x, r.y = y, r.op = op, r.outer_rank = r.inner_rank = 1, r.y_outer[0] = 1;
  r.outer[0] = columns ? kWide : kRows, r.x_outer[0] = columns ? 1 : kWide;
  r.inner[0] = columns ? kRows : kWide, r.x_inner[0] = columns ? kWide : 1;
  return r;
}

qg_copy turned(qg_ref x, qg_ref y) {
  qg_copy c{};
  c.x = {x, 2, {kWide, kRows}, {1, kWide}}, c.y = {y, 2, {kWide, kRows}, {kRows, 1}};
  for (int i = 0; i < QG_RANK; i++) c.x_starts[i].index = c.y_starts[i].index = kNone;
  return c;
}

// All that is neither product, attention nor norm: `m` is what they read, the others are written.
void add_moves(Made* made, qg_ref m, qg_ref z, qg_ref t, qg_ref order, qg_ref line) {
  made->add(QG_SOFTMAX, qg_softmax{rows_of(m, z)});
  made->add(QG_REDUCE, reduction(m, line, QG_SUM, true), 0);
  made->add(QG_SCAN, qg_scan{rows_of(z, t), QG_SUM, 0, 0});
  made->add(QG_SCAN, qg_scan{columns_of(t, z), QG_MAX, 1, 1});
  qg_ref largest = line;
  largest.offset = kWide * 4;
  made->add(QG_REDUCE, reduction(t, largest, QG_MAX, false));
  made->add(QG_COPY, turned(m, t));
  qg_elementwise mixed = doubled(made, t, z, kRows * kWide);  // reads across what it writes
  mixed.rank = 2, mixed.shape[0] = kRows, mixed.shape[1] = kWide;
  qg_operand across{t, {1, kRows}};
  qg_output out{{z, {kWide, 1}}, 1};
  mixed.input_at = made->place(&across), mixed.output_at = made->place(&out);
  made->add(QG_ELEMENTWISE, mixed);
  made->add(QG_SORT, qg_sort{rows_of(z, order), 1, 0, 0, 0});
  qg_take_along along{rows_of(z, t), order, {kWide}, 1, kWide, kWide, 0};
  made->add(QG_TAKE_ALONG, along);
  made->add(QG_TAKE, qg_take{t, z, kNone, kNone, order, 1, kRows, kWide, kRows, QG_DENSE, 0, 0});
  qg_ref offsets = made->buffer(QG_I64, 3 * 8), key = made->buffer(QG_U32, 8);
  qg_ref words = made->buffer(QG_U32, kWords * 4);
  qg_scatter scatter{m, z, offsets, 1, {kWide}, {1}, {1}, 3, kWide, 0, (kRows - 1) * kWide, QG_SUM};
  made->add(QG_SCATTER, scatter);
  made->add(QG_RANDOM, qg_random{key, words, 1, kWords}, 0);
  qg_rope rope{};
  rope.x = z, rope.y = t, rope.freqs = rope.offset = kNone, rope.batch = 1, rope.heads = 3;
  rope.length = kRows, rope.dim = rope.dims = 32, rope.base = 1e4, rope.scale = 1;
  int64_t heads[] = {0, 32, kWide, 1};
  std::memcpy(rope.x_strides, heads, sizeof(heads)), std::memcpy(rope.y_strides, heads, sizeof(heads));
  made->add(QG_ROPE, rope);
}

}  // namespace

int main() {
  Made made;
  qg_ref x = made.buffer(QG_F32, kRows * kWide * 4), w = made.buffer(QG_F32, kWide * kWide * 4);
  qg_ref h = made.buffer(QG_F32, kRows * kWide * 4), y = made.buffer(QG_F32, kRows * kWide * 4);
  qg_ref keys = made.buffer(QG_F32, kKeys * kWide * 4), left = made.buffer(QG_I32, 4);
  qg_ref beside = made.buffer(QG_F32, 3 * kWide * 4);
  qg_norm norm{x, h, kNone, kNone, 0, kRows, kWide, kWide, 1, kWide, 1, 1e-5};
  made.add(QG_NORM, norm);
  made.add(QG_MATMUL, product(h, w, y, kRows, kWide, kWide));    // panels
  made.add(QG_MATMUL, product(x, w, beside, 3, kWide, kWide), 0);  // a few rows, at once
  qg_attention attention{};
  attention.q = y, attention.k = attention.v = keys, attention.y = h;
  attention.last = attention.first = attention.mask = attention.sinks = kNone;
  attention.batch = 1, attention.heads = attention.kv_heads = 3, attention.queries = 1;
  attention.keys = kKeys, attention.dim = attention.value_dim = 32, attention.scale = 0.2;
  int64_t heads[] = {0, 32, kWide, 1};
  std::memcpy(attention.q_strides, heads, sizeof(heads));
  std::memcpy(attention.k_strides, heads, sizeof(heads));
  std::memcpy(attention.v_strides, heads, sizeof(heads));
  std::memcpy(attention.y_strides, heads, sizeof(heads));
  made.add(QG_ATTENTION, attention);  // keys split among tasks, and joined
  qg_ref z = made.buffer(QG_F32, kRows * kWide * 4), t = made.buffer(QG_F32, kRows * kWide * 4);
  qg_ref order = made.buffer(QG_U32, kRows * kWide * 4), line = made.buffer(QG_F32, (kWide + kRows) * 4);
  add_moves(&made, h, z, t, order, line);
  made.add(QG_ELEMENTWISE, doubled(&made, y, x, kRows * kWide));
  qg_elementwise count = doubled(&made, left, left, 1);  // a turn less
  qg_instruction less[] = {{QG_OP_CONST, QG_I32, -1, -1, -1, 0, {}}, {QG_OP_ADD, QG_I32, 0, 1, -1, 0, {}}};
  less[0].value.integer = -1;
  qg_output out{{left, {1}}, 2};
  count.instructions = 2, count.instruction_at = made.place(less, 2), count.output_at = made.place(&out);
  made.add(QG_ELEMENTWISE, count);
  made.add(QG_JUMP, qg_jump{left, (int64_t)made.steps.size() + 2});
  made.add(QG_JUMP, qg_jump{kNone, 0});
  void* region = made.make();
  if (!region) return 2;

  auto call = [&](int threads) {
    std::vector<float> xs(kRows * kWide), ws(kWide * kWide), hs(kRows * kWide), ys(kRows * kWide),
        ks(kKeys * kWide), bs(3 * kWide);
    for (size_t i = 0; i < xs.size(); i++) xs[i] = std::sin((float)i);
    for (size_t i = 0; i < ws.size(); i++) ws[i] = std::cos(3.0f * (float)i) / 10;
    for (size_t i = 0; i < ks.size(); i++) ks[i] = std::sin(7.0f * (float)i);
    std::vector<float> zs(kRows * kWide), ts(kRows * kWide), lines(kWide + kRows);
    std::vector<uint32_t> orders(kRows * kWide), words_drawn(kWords), key{3, 7};
    std::vector<int64_t> offsets{0, 5 * kWide, 5 * kWide};
    int32_t turns = kTurns;
    void* pointers[] = {xs.data(), ws.data(), hs.data(), ys.data(), ks.data(), &turns, bs.data(),
                        zs.data(), ts.data(), orders.data(), lines.data(), offsets.data(), key.data(),
                        words_drawn.data()};
    char words[256];
    if (qgraph_region_run(region, pointers, threads, nullptr, words, sizeof(words))) return std::vector<float>();
    xs.insert(xs.end(), hs.begin(), hs.end());
    for (const auto& more : {bs, zs, ts, lines}) xs.insert(xs.end(), more.begin(), more.end());
    for (uint32_t word : words_drawn) xs.push_back((float)word);
    return xs;
  };
  std::vector<float> want = call(1);
  bool right = std::isfinite(want[5]) && !want.empty();
  std::vector<std::thread> callers;
  std::vector<char> same(3, 1);
  for (int c = 0; c < 3; c++)
    callers.emplace_back([&, c] {
      for (int i = 0; i < 20; i++) same[c] = same[c] && call(4) == want;
    });
  for (auto& caller : callers) caller.join();
  for (char s : same) right = right && s;
  qgraph_region_free(region);
  std::puts(right ? "right" : "wrong");
  return !right;
}
