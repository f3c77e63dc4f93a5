// Blocks for products of many rows: of the weight a panel (k, kWide) of float32 in the cache, of x
// a few rows in columns or stretches, so that the inner loop reads both from one place each.
#pragma once

#include "products.hpp"

namespace qgraph {

constexpr long kWide = 2 * kLanes;  // columns of y
constexpr long kStretch = 256;      // columns of x side by side
constexpr long kDeep = 512;        // of k at a time: a panel fits the second cache
#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kTall = 14;  // rows of x whose sums fit the registers
#elif defined(__AVX2__)
constexpr int kTall = 6;
#else
constexpr int kTall = 12;
#endif

// How a weight lies, for any matrix of it.
struct PanelShape {
  qg_matmul a;
  long groups;
};

// Floats that `fill_panel` wants beside the panel.
long panel_room(const PanelShape& shape);

// Columns `first` to `first + kWide` of the transposed weight, `begin` to `end` of k, to a panel;
// columns past n hold anything.
void fill_panel(const PanelShape& shape, const Matrices::Weight& w, const qg_weight& refs,
                long first, long begin, long end, float* panel, float* room);

// Puts up to kTall rows of x, of a dtype and strides, into stretches: (stretches, kTall, kStretch).
void stretch_rows(int dtype, const char* x, long row, long column, long rows, long k, float* to);

// Puts up to kTall rows of x into columns: (k, kTall), and kLanes floats behind that are spoilt.
void pack_rows(int dtype, const char* x, long row, long column, long rows, long k, float* to);

// sums (rows, kWide), `step` floats from row to row, += or = x, in stretches, by a panel of `k`; up
// to kTall rows.
void add_tile(int rows, const float* x, const float* panel, long k, float* sums, long step,
              bool fresh);

}  // namespace qgraph
