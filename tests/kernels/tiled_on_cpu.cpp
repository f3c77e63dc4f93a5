// `product.cuh` of `tiled` by a CPU: what `instructions.cuh` asks of a GPU is done here as the PTX ISA says.
//
// Copies are made at once or when they are waited for, as `late` says, and products when they are
// waited for: a slot that is filled too early or read too early gives wrong numbers in one way or
// the other.

#include <functional>

#include "words_on_cpu.hpp"

#undef __shared__
#define __shared__

namespace qgraph {
namespace tiled {

alignas(1024) char stages[227 << 10];
bool late;

inline unsigned __cvta_generic_to_shared(const char* p) { return p - stages; }

// ---- products: a group of those that were begun together, of each thread

struct Fragments {
  unsigned a[4];
};
std::vector<std::vector<std::vector<std::function<void()>>>> products, copies;
std::vector<Fragments> fragments;

inline void forget() {
  products.assign(fibers.size(), {{}});
  copies.assign(fibers.size(), {{}});
  fragments.resize(fibers.size());
}

struct Operand {
  unsigned shared;
  int step;
};
inline Operand operand(unsigned shared) { return {shared, 0}; }
inline Operand at_columns(Operand x, int step) { return {x.shared, step}; }

// A row of x, 16 columns of which are multiplied, lies in 128 bytes whose 16-byte pieces change
// places by the number of the row.
template <typename T>
float element(Operand x, int row, int column) {
  const int piece = (2 * x.step + column / 8) ^ row % 8;
  T v;
  std::memcpy(&v, stages + x.shared + row * 128 + piece * 16 + column % 8 * 2, 2);
  return float(v);
}

template <typename T, int COLUMNS>
void multiply(float* c, const unsigned (&a)[4], Operand x) {
  const Fragments mine{{a[0], a[1], a[2], a[3]}};
  products[threadIdx.x].back().push_back([=] {
    const int me = threadIdx.x, lane = me % 32, first = me - lane;
    fragments[me] = mine;
    meet(warps[me / 32]);
    for (int i = 0; i < COLUMNS / 2; i++) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; k++) {
        const Fragments& other = fragments[first + row % 8 * 4 + k % 8 / 2];
        const unsigned word = other.a[row / 8 + k / 8 * 2];
        c[i] += float(number<T>(word, k % 2)) * element<T>(x, column, k);
      }
    }
    meet(warps[me / 32]);
  });
}
inline void begin() {}
inline void finish(std::vector<std::vector<std::function<void()>>>& groups, size_t left) {
  while (groups.size() > left + 1) {  // the last is still open
    for (auto& one : groups.front()) one();
    groups.erase(groups.begin());
  }
}
inline void commit() { products[threadIdx.x].emplace_back(); }
template <int LEFT>
void wait() {
  finish(products[threadIdx.x], LEFT);
}

// ---- copies

template <bool SURELY>
void copy_16(unsigned to, const void* from, bool inside) {
  if (to % 16 || reinterpret_cast<size_t>(from) % 16) std::abort();
  auto copy = [=] {
    if (SURELY || inside)
      std::memcpy(stages + to, from, 16);
    else
      std::memset(stages + to, 0, 16);
  };
  if (late)
    copies[threadIdx.x].back().push_back(copy);
  else
    copy();
}
template <typename T>
void copy_unaligned(unsigned to, const T* from, bool inside) {
  if (inside)
    std::memcpy(stages + to, from, 16);
  else
    std::memset(stages + to, 0, 16);
}
inline void commit_copies() { copies[threadIdx.x].emplace_back(); }
template <int LEFT>
void wait_for_copies() {
  finish(copies[threadIdx.x], LEFT);
}

}  // namespace tiled
}  // namespace qgraph

#include "formats.cuh"
#include "product.cuh"
#include "experts.cuh"
#include "rows.cuh"

namespace {

using namespace qgraph::tiled;

struct Given {
  const void* x;
  const unsigned* w;
  const void* scales;
  void* y;
  int* starts;
  unsigned *in_x, *in_y;
  int m, k, tiles, experts;
} given;

template <typename T, typename Y, Mode MODE, int BITS, int GROUP, int N, int WN, int WK,
          int COLUMNS, int DEPTH, int STAGES>
void plain() {
  if (threadIdx.x == 0) forget();
  __syncthreads();
  product<Product<T, MODE, BITS, GROUP, WN, WK, COLUMNS, DEPTH, STAGES>, N, sizeof(Y) == 4>(
      static_cast<const T*>(given.x), given.w, given.scales, static_cast<Y*>(given.y), given.m,
      given.k, given.tiles);
}

void experts() {
  if (threadIdx.x == 0) forget();
  __syncthreads();
  using T = __nv_bfloat16;
  gathered_product<Product<T, AFFINE, 8, 64, 2, 2, 16, 256, 3>, 70>(
      static_cast<const T*>(given.x), given.w, given.scales, given.starts,
      {given.in_x, given.in_y}, static_cast<T*>(given.y), given.k, given.tiles, given.experts);
}

void rows_of_experts() {
  if (threadIdx.x == 0) forget();
  __syncthreads();
  using T = __nv_bfloat16;
  gathered_rows<Product<T, AFFINE, 8, 64, 2, 2, 16, 256, 3>, 70>(
      static_cast<const T*>(given.x), given.w, given.scales, given.in_y, given.in_x,
      static_cast<T*>(given.y), given.k, given.tiles);
}

using B = __nv_bfloat16;
using H = __half;
void (*kernels[])() = {
    plain<B, B, AFFINE, 4, 64, 0, 1, 2, 8, 256, 6>,
    plain<B, float, AFFINE, 4, 64, 0, 1, 2, 8, 256, 6>,
    plain<B, B, AFFINE, 3, 32, 71, 2, 1, 16, 128, 3>,
    plain<B, B, AFFINE, 6, 128, 0, 2, 1, 64, 64, 4>,
    plain<H, H, AFFINE, 5, 32, 0, 1, 2, 32, 128, 4>,
    plain<B, B, AFFINE, 2, 64, 70, 1, 1, 24, 64, 3>,
    plain<H, H, AFFINE, 8, 32, 0, 1, 4, 8, 512, 3>,
    plain<B, B, MXFP4, 4, 32, 0, 1, 1, 8, 128, 3>,
    plain<H, H, NVFP4, 4, 16, 0, 1, 2, 8, 128, 3>,
    plain<B, B, MXFP8, 8, 32, 0, 1, 1, 8, 64, 3>,
    plain<B, B, NVFP4, 4, 16, 0, 2, 1, 64, 64, 3>,
    experts,
    rows_of_experts,
};

}  // namespace

extern "C" bool run(Given what, int which, int threads, int x, int y, int z, bool copy_late) {
  given = what;
  late = copy_late;
  std::memset(stages, 0xff, sizeof stages);  // not a number
  return launch(kernels[which], {x, y, z}, threads);
}

extern "C" void add(const float* parts, void* y, int count, int size) {
  static const float* from;
  static B* to;
  static int number, all;
  from = parts, to = static_cast<B*>(y), number = count, all = size;
  launch([] { add_parts<B>(from, to, number, all); }, (size + 255) / 256, 64);
}

// Of m matrices of `each` rows; lhs and rhs in the places of x and w.
extern "C" bool group(Given what, int each) {
  static int rows;
  given = what, rows = each;
  return launch(
      [] {
        group_rows(static_cast<const unsigned*>(given.x), given.w, given.starts, given.in_x,
                   given.in_y, given.m, rows, given.experts);
      },
      1, 128);
}

template <Mode MODE, int BITS, int GROUP, typename S>
void rows() {
  take_rows<MODE, BITS, GROUP, S>(given.w, given.scales, given.starts,
                                  static_cast<unsigned*>(given.y), reinterpret_cast<S*>(given.in_x),
                                  reinterpret_cast<S*>(given.in_y), given.m, given.k);
}

// Of a weight of m rows; their numbers in the place of starts, how many in that of experts.
extern "C" bool take(Given what, int which) {
  using U = unsigned short;
  static void (*of[])() = {
      rows<AFFINE, 2, 64, U>, rows<AFFINE, 3, 32, U>,  rows<AFFINE, 4, 64, U>,
      rows<AFFINE, 5, 32, U>, rows<AFFINE, 6, 128, U>, rows<AFFINE, 8, 32, U>,
      rows<NVFP4, 4, 16, unsigned char>,
  };
  given = what;
  return launch(of[which], {(given.k + 2047) / 2048, given.experts, 1}, 64);
}
