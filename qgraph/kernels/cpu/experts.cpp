// Many rows that each pick a matrix, as of experts: the rows of one matrix together.

#include "panels.hpp"

namespace qgraph {
namespace {

constexpr long kPanels = 4;    // of a task
constexpr long kDepth = 512;   // of k at a time
constexpr long kGroup = 9 * kTall;  // rows between fillings of the panels

class Experts : public Product {
 public:
  explicit Experts(const qg_matmul& args)
      : Product(args), shape_{args, groups()}, matrices_(a.w_matrices) {}

  int stages() const override { return 2; }

  long tasks(int stage, int) const override {
    return stage ? matrices_ * over(a.n, kPanels * kWide) : 1;
  }

  long shared_bytes() const override { return (matrices_ + 1 + entries_) * (long)sizeof(int32_t); }

  long own_bytes() const override {
    long sums = kGroup * kPanels * kWide * (gated() ? 2 : 1);
    return (kPanels * kDepth * kWide + kTall * kDepth + sums + panel_room(shape_)) *
           (long)sizeof(float);
  }

  void run(const Here& here, int stage, long task) const override {
    int32_t *starts = (int32_t*)here.shared, *order = starts + matrices_ + 1;
    if (stage == 0) return sort(here, starts, order);
    long parts = over(a.n, kPanels * kWide), matrix = task / parts;
    for (long i = starts[matrix]; i < starts[matrix + 1]; i += kGroup) {
      long rows = starts[matrix + 1] - i < kGroup ? starts[matrix + 1] - i : kGroup;
      group(here, order + i, rows, task % parts * kPanels * kWide);
    }
  }

 private:
  // The entries in the order of their matrices, and where those of each begin.
  void sort(const Here& here, int32_t* starts, int32_t* order) const {
    std::memset(starts, 0, (matrices_ + 1) * sizeof(int32_t));
    auto matrix = [&](long entry) { return number(here, a.rhs, entry, matrices_); };
    for (long i = 0; i < entries_; i++) starts[matrix(i) + 1]++;
    for (long e = 0; e < matrices_; e++) starts[e + 1] += starts[e];
    for (long i = 0; i < entries_; i++) order[starts[matrix(i)]++] = (int32_t)i;
    for (long e = matrices_; e > 0; e--) starts[e] = starts[e - 1];
    starts[0] = 0;
  }

  void group(const Here& here, const int32_t* entries, long rows, long first) const {
    long count = a.n - first < kPanels * kWide ? a.n - first : kPanels * kWide;
    float *panel = (float*)here.own, *x = panel + kPanels * kDepth * kWide;
    float *sums = x + kTall * kDepth, *sums2 = sums + kGroup * kPanels * kWide;
    float* room = gated() ? sums2 + kGroup * kPanels * kWide : sums2;
    Matrices one = matrices(here, entries[0]);
    multiply(here, one.w, a.w, entries, rows, first, count, panel, x, sums, room);
    if (gated()) multiply(here, one.w2, a.w2, entries, rows, first, count, panel, x, sums2, room);
    for (long i = 0; i < rows; i++) {
      Matrices at = matrices(here, entries[i]);
      for (long j = 0; j < count; j += kWide) {
        long own = j / kWide * kGroup * kWide + i * kWide;
        finish(here, at, 0, 1, first + j, sums + own, gated() ? sums2 + own : nullptr, kWide,
               count - j < kWide ? count - j : kWide);
      }
    }
  }

  void multiply(const Here& here, const Matrices::Weight& w, const qg_weight& refs,
                const int32_t* entries, long rows, long first, long count, float* panel, float* x,
                float* sums, float* room) const {
    for (long k = 0; k < a.k; k += kDepth) {
      long end = k + kDepth < a.k ? k + kDepth : a.k;
      for (long j = 0; j < count; j += kWide)
        fill_panel(shape_, w, refs, first + j, k, end, panel + j * kDepth, room);
      for (long i = 0; i < rows; i += kTall) {
        int some = (int)(rows - i < kTall ? rows - i : kTall);
        for (int r = 0; r < some; r++) {
          const char* from = matrices(here, entries[i + r]).x + k * a.x_column * size_of(a.x.dtype);
          stretch_rows(a.x.dtype, from, 0, a.x_column, 1, end - k, x + r * kStretch);
        }
        for (long j = 0; j < count; j += kWide)
          add_tile(some, x, panel + j * kDepth, end - k,
                   sums + j / kWide * kGroup * kWide + i * kWide, kWide, k == 0);
      }
    }
  }

  PanelShape shape_;
  long matrices_;
};

}  // namespace

Maker experts(const qg_matmul& args) { return Maker(new Experts(args)); }

}  // namespace qgraph
