// Products of rows that are first rounded to bytes with packed weights: codes times codes.
//
// In each group of 32 a row is scale q + bias, q a byte with a sign, and a weight is scale c + bias.
// So its sum is w.scale (x.scale sum(q c) + x.bias sum(c)) + w.bias sum(x): four multiplications a
// lane in one instruction, where the processor has it.

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include <immintrin.h>
#endif

#include <cmath>

#include "panels.hpp"

namespace qgraph {
namespace {

constexpr long kGroup = 32;
constexpr long kDots = kGroup / 4;  // lanes' words of a group
#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kRows = 6;  // whose sums fit the registers
#else
constexpr int kRows = 2;
#endif
constexpr long kChunk = 16 * kRows;  // rows between epilogues
constexpr long kTaken = 4;           // rows that a task rounds

// sums + codes from 0 to 255 times bytes with signs, four of each in a lane.
inline Ints dots(Ints sums, Words codes, int32_t bytes) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(bytes));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, _mm256_set1_epi32(bytes));
#else
  for (int i = 0; i < 4; i++)
    sums += (Ints)(codes >> (8 * i) & 255) * (int32_t)(int8_t)((uint32_t)bytes >> (8 * i));
  return sums;
#endif
}

// Rows of x, ready: bytes, and of each group what the sums are multiplied by.
struct Rows {
  int8_t* bytes;
  float *scales, *biases, *sums;
};

// kWide rows of the weight: (k / 4, kWide) words of codes; of each group (groups, kWide) scales,
// biases and sums of codes.
struct Panel {
  uint32_t* words;
  float *scales, *biases, *sums;
};

class Rounded : public Product {
 public:
  explicit Rounded(const qg_matmul& args)
      : Product(args), groups_(a.k / kGroup), own_groups_(a.k / a.group), panels_(over(a.n, kWide)) {}

  int stages() const override { return 2; }

  long tasks(int stage, int threads) const override {
    return stage == 0 ? over(a.m, kTaken) : parts(threads) * panels_;
  }

  long shared_bytes() const override { return up(a.m * a.k, 64) + 3 * a.m * groups_ * 4; }

  bool begins_like(const Work& other) const override {
    auto* product = dynamic_cast<const Rounded*>(&other);
    return product && a.bits == product->a.bits && same_rows(*product);
  }

  long own_bytes() const override {
    long panel = a.k * kWide + 3 * groups_ * kWide * 4, sums = kChunk * kWide * 4;
    return (panel + sums) * (gated() ? 2 : 1) + 2 * floats_of(own_groups_) * 4;
  }

  void run(const Here& here, int stage, long task) const override {
    Rows x{(int8_t*)here.shared, (float*)(here.shared + up(a.m * a.k, 64)), nullptr, nullptr};
    x.biases = x.scales + a.m * groups_;
    x.sums = x.biases + a.m * groups_;
    if (stage == 0) {
      for (long i = task * kTaken; i < a.m && i < (task + 1) * kTaken; i++) take_row(here, i, x);
      return;
    }
    long count = parts(here.threads), first = task % panels_ * kWide, part = over(a.m, count);
    long begin = task / panels_ * part, end = begin + part < a.m ? begin + part : a.m;
    Matrices at = matrices(here, 0);
    float* room = (float*)here.own;
    Panel panel = filled(at.w, a.w, first, &room), panel2{};
    if (gated()) panel2 = filled(at.w2, a.w2, first, &room);
    float *sums = room, *sums2 = gated() ? sums + kChunk * kWide : nullptr;
    for (long i = begin; i < end; i += kChunk) {
      long rows = end - i < kChunk ? end - i : kChunk;
      multiply(x, i, rows, panel, sums);
      if (sums2) multiply(x, i, rows, panel2, sums2);
      finish(here, at, i, rows, first, sums, sums2, kWide, a.n - first < kWide ? a.n - first : kWide);
    }
  }

 private:
  long groups_, own_groups_, panels_;  // groups: of x, and of the weight

  // Parts of the rows, so that there are tasks for all threads.
  long parts(int threads) const {
    long count = 1;
    while (threads > 1 && count * panels_ < 3 * threads && a.m >= 2 * kRows * (count + 1)) count++;
    return count;
  }

  // The smallest of `low` and the largest of `high`, both in one vector.
  static void range_of(Floats low, Floats high, float* least, float* most) {
    constexpr int half = kLanes / 2;
    constexpr Ints firsts = lanes_of([](int i) { return i < half ? i : i + half; });
    constexpr Ints lasts = lanes_of([](int i) { return i < half ? i + half : i + kLanes; });
    Floats both = larger(__builtin_shuffle(high, -low, firsts), __builtin_shuffle(high, -low, lasts));
    if constexpr (half > 4) both = larger(both, across<4>(both));
    if constexpr (half > 2) both = larger(both, across<2>(both));
    both = larger(both, across<1>(both));
    *most = both[0], *least = -both[half];
  }

  // By the rule of mx.quantize: zero is one of the numbers, and the end farther from it another.
  void take_row(const Here& here, long i, const Rows& x) const {
    const char* from = here(a.x) + i * a.x_row * size_of(a.x.dtype);
    float* row = (float*)here.own;
    widen(a.x.dtype, from, a.x_column, row, a.k);
    for (long g = 0; g < groups_; g++, row += kGroup) {
      Floats low = load<Floats>(row), high = low, finite{};
      for (long j = 0; j < kGroup; j += kLanes) {
        Floats own = load<Floats>(row + j);
        low = own < low ? own : low, high = own > high ? own : high;
        finite += own * 0.0f;
      }
      float least, most;
      range_of(low, high, &least, &most);
      float step = (most - least) / 255;
      if (step < 1e-7f) step = 1e-7f;
      if (std::fabs(least) <= std::fabs(most)) step = -step;
      float edge = step > 0 ? least : most, whole = std::rint(edge / step);
      step = whole == 0 ? step : edge / whole;
      edge = whole == 0 ? 0 : edge;
      Floats codes{};
      uint8_t bytes[kGroup];
      for (long j = 0; j < kGroup; j += kLanes) {
        Floats q = (load<Floats>(row + j) - edge) / step;
        q = q > 0.0f ? q : Floats{};
        q = (q < 255.0f ? q : all(255)) + 0x1p23f;  // rounds, and leaves the code in the last bits
        codes += q - (0x1p23f + 128);
        store(bytes + j, __builtin_convertvector(as_words(q) ^ 128, Bytes));
      }
      int8_t* to = x.bytes + i * a.k + g * kGroup;
      for (long j = 0; j < kGroup; j += 8) {
        uint64_t eight = load<uint64_t>(bytes + j);
        store(to + j, a.bits == 8 ? eight : even(eight) | even(eight >> 8) << 32);
      }
      float total = sum(codes + finite);  // NaN, if one of them is not finite
      long at = i * groups_ + g;
      x.scales[at] = step + total * 0;
      x.biases[at] = edge + 128 * step;
      x.sums[at] = step * total + kGroup * x.biases[at];
    }
  }

  // Every second byte: codes of four bits come as words of even ones and words of odd ones.
  static uint64_t even(uint64_t x) {
    x &= 0x00ff00ff00ff00ff;
    x = (x | x >> 8) & 0x0000ffff0000ffff;
    return (x | x >> 16) & 0xffffffff;
  }

  // Of rows past the last of the weight it holds the last again.
  Panel filled(const Matrices::Weight& w, const qg_weight& refs, long first, float** room) const {
    Panel panel{(uint32_t*)*room, *room + a.k / 4 * kWide, nullptr, nullptr};
    panel.biases = panel.scales + groups_ * kWide;
    panel.sums = panel.biases + groups_ * kWide;
    float* few = panel.sums + groups_ * kWide;
    *room = few;
    float* few2 = few + floats_of(own_groups_);  // the room behind is free while panels are filled
    for (long j = 0; j < kWide; j++) {
      long row = first + j < a.n ? first + j : a.n - 1;
      group_scales(a, w, refs, row * own_groups_, own_groups_, 0, few, few2);
      for (long g = 0, at = j; g < own_groups_; g++)
        for (long i = 0; i < a.group; i += kGroup, at += kWide)
          panel.scales[at] = few[g], panel.biases[at] = few2[g];
    }
    for (long j = 0; j < kWide; j += kLanes) fill_words(w, first + j, panel.words + j);
    for (long g = 0; g < groups_; g++)
      for (long j = 0; j < kWide; j += kLanes) {
        Ints sum{};
        for (long d = 0; d < kDots; d++)
          sum = dots(sum, load<Words>(panel.words + (g * kDots + d) * kWide + j), 0x01010101);
        store(panel.sums + g * kWide + j, converted(sum));
      }
    return panel;
  }

  void fill_words(const Matrices::Weight& w, long first, uint32_t* to) const {
    long start = first < a.n ? first : a.n - 1;
    const uint8_t* from = (const uint8_t*)w.codes + start * row_bytes();
    Ints rows;
    for (int i = 0; i < kLanes; i++) rows[i] = (start + i < a.n ? i : a.n - 1 - start) * row_bytes();
    for (long at = 0; at < row_bytes(); at += 4) {
      Words words = Units<Integer<8>>::gathered(from + at, rows);
      if (a.bits == 8) {
        store(to, words);
        to += kWide;
      } else {
        store(to, words & 0x0f0f0f0f);
        store(to + kWide, words >> 4 & 0x0f0f0f0f);
        to += 2 * kWide;
      }
    }
  }

  void multiply(const Rows& x, long first, long rows, const Panel& panel, float* sums) const {
    for (long i = 0; i < rows; i += kRows, sums += kRows * kWide)
      some_rows<kRows>(rows - i < kRows ? rows - i : kRows, x, first + i, panel, sums);
  }

  template <int R>
  void some_rows(long rows, const Rows& x, long first, const Panel& panel, float* sums) const {
    if constexpr (R > 1)
      if (rows < R) return some_rows<R - 1>(rows, x, first, panel, sums);
    Floats totals[R][2] = {};
    const int8_t* bytes = x.bytes + first * a.k;
    const uint32_t* words = panel.words;
    for (long g = 0; g < groups_; g++) {
      Ints dot[R][2] = {};
      QG_UNROLLED
      for (long d = 0; d < kDots; d++, words += kWide, bytes += 4) {
        Words left = load<Words>(words), right = load<Words>(words + kLanes);
        QG_UNROLLED
        for (int r = 0; r < R; r++) {
          int32_t own = load<int32_t>(bytes + r * a.k);
          dot[r][0] = dots(dot[r][0], left, own);
          dot[r][1] = dots(dot[r][1], right, own);
        }
      }
      QG_UNROLLED
      for (int j = 0; j < 2; j++) {
        long at = g * kWide + j * kLanes;
        Floats scale = load<Floats>(panel.scales + at), bias = load<Floats>(panel.biases + at);
        Floats codes = load<Floats>(panel.sums + at);
        QG_UNROLLED
        for (int r = 0; r < R; r++) {
          long own = (first + r) * groups_ + g;
          Floats sum = converted(dot[r][j]) * x.scales[own] + codes * x.biases[own];
          totals[r][j] += scale * sum + bias * x.sums[own];
        }
      }
    }
    QG_UNROLLED
    for (int r = 0; r < R; r++) {
      store(sums + r * kWide, totals[r][0]);
      store(sums + r * kWide + kLanes, totals[r][1]);
    }
  }
};

}  // namespace

Maker rounded_rows(const qg_matmul& args) { return Maker(new Rounded(args)); }

bool multiplies_bytes() {
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
  return true;
#else
  return false;
#endif
}

}  // namespace qgraph
