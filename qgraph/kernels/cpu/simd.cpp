// Products of float32 rows with packed weights, in vector registers, on every core.
//
// A few rows of the weight at a time are decoded into a buffer that stays in the cache, and each is
// multiplied by all rows of x.  Decoding takes the same bits of as many words as a register has
// lanes, so it gives elements out of order; x is put into the same order first.
//
// Formats: OCP Microscaling Formats (MX) v1.0 for E2M1, E4M3 and E8M0.

#include "lanes.hpp"

#include <algorithm>
#include <type_traits>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int kRowsOfX = 4;
#else
constexpr int kRowsOfX = 2;
#endif
constexpr int kRowsOfW = 4;
constexpr long kTogether = 4 * kRowsOfW;
constexpr long kSlab = 512;  // rows of x that are put into order at a time, to bound the memory
constexpr long kColumns = 2048;  // decoded at a time: four rows of them fit a core's first cache

// ---- Codes and scales as numbers ----------------------------------------------------------------

struct Integer {
  static Floats value(Words code) { return converted(code); }
};

struct E2M1 {
  static Floats value(Words code) {
    constexpr float magnitudes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    Floats table;  // looked up by the low bits of a code: four with 16 lanes, else three
    for (int i = 0; i < kLanes; i++) table[i] = i < 8 ? magnitudes[i] : -magnitudes[i - 8];
    Floats found = __builtin_shuffle(table, (Ints)code);
    if (kLanes >= 16) return found;
    return as_floats((Words)found | ((code & 8) << 28));
  }
};

struct E4M3 {
  using Stored = uint8_t;
  static Floats value(Words code) {
    Words magnitude = code & 127, sign = (code & 128) << 24;
    Floats small = converted(magnitude) * 0x1p-9f;  // exponent 0: multiples of 2^-9
    Words bits = magnitude < 8 ? (Words)small : (magnitude << 20) + (120u << 23);
    bits = magnitude == 127 ? Words{} + 0x7fc00000u : bits;
    return as_floats(bits | sign);
  }
};

struct E8M0 {
  using Stored = uint8_t;
  static Floats value(Words code) {
    Words bits = code == 0 ? Words{} + 0x00400000u : code << 23;  // 2^-127 is a denormal
    return as_floats(code == 255 ? Words{} + 0x7fc00000u : bits);
  }
};

struct BFloat16 {
  using Stored = uint16_t;
  static Floats value(Words bits) { return as_floats(bits << 16); }
};

struct Float16 {
  using Stored = uint16_t;
  static Floats value(Words bits) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)bits));
#elif defined(__F16C__) && defined(__AVX2__)
    __m256i both = (__m256i)bits;
    __m128i low = _mm256_castsi256_si128(both), high = _mm256_extracti128_si256(both, 1);
    return (Floats)_mm256_cvtph_ps(_mm_packus_epi32(low, high));
#else
    Words sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    Floats small = converted(magnitude) * 0x1p-24f;
    Words normal = (magnitude << 13) + (112u << 23);
    normal = magnitude >= 0x7c00 ? normal + (112u << 23) : normal;  // infinities and NaN
    return as_floats((magnitude < 0x400 ? (Words)small : normal) | sign);
#endif
  }
};

struct Float32 {
  using Stored = uint32_t;
  static Floats value(Words bits) { return as_floats(bits); }
};

// ---- Formats ------------------------------------------------------------------------------------

// A packed weight: `Bits` a code that means `Code`, a `Scale` for each group.
template <int Bits, int Group, typename Code, typename Scale>
struct Format {
  using Stored = typename Scale::Stored;
  typedef Stored Several __attribute__((vector_size(kLanes * sizeof(Stored))));
  static constexpr bool kBiased = std::is_same_v<Code, Integer>;

  // Codes that straddle words (3, 5 and 6 bits) are taken in order, one a lane.
  static constexpr bool kStraddles = 32 % Bits != 0;
  static constexpr int kCodes = kStraddles ? 1 : 32 / Bits;  // of one lane
  static constexpr int kBlock = kLanes * kCodes;             // elements of one register of words

  struct Row {
    const uint8_t* codes;
    const Stored* scales;
    const Stored* biases;
  };

  const uint8_t* codes;
  const Stored* scales;
  const Stored* biases;
  long n, k, groups;

  Row row(long i) const {
    const Stored* own_biases = kBiased ? biases + i * groups : nullptr;
    return {codes + i * (k * Bits / 8), scales + i * groups, own_biases};
  }

  // The scale (or bias) of each lane of the block of a row that begins at element `start`.
  Floats lanes(const Stored* row, long start, const Stored* end) const {
    long first = start / Group;
    if constexpr (Group >= kBlock) return Scale::value(Words{} + row[first]);
    constexpr int kEach = std::min(Group, kBlock) / kCodes, kCount = kLanes / kEach;
    Words some{}, order{};
    if (first + kCount <= groups && row + first + kLanes <= end) {
      some = __builtin_convertvector(load<Several>(row + first), Words);  // more than are needed
    } else {
      for (int i = 0; i < kCount && first + i < groups; i++) some[i] = row[first + i];
    }
    for (int i = 0; i < kLanes; i++) order[i] = i / kEach;
    return Scale::value(__builtin_shuffle(some, order));
  }

  // Decode elements `start` to `stop`, in blocks; what lies past the row's end is zero.
  void decode(Row row, long start, long stop, float* out) const {
    for (long at = start; at < stop; at += kBlock, out += kBlock) {
      Words words = words_at(row.codes, at);
      Floats scale = lanes(row.scales, at, scales + n * groups), bias{};
      if (kBiased) bias = lanes(row.biases, at, biases + n * groups);
      for (int i = 0; i < kCodes; i++) {
        Words code = kStraddles ? words : (words >> (Bits * i)) & ((1u << Bits) - 1);
        Floats value = Code::value(code) * scale + bias;
        std::memcpy(out + i * kLanes, &value, sizeof(value));
      }
    }
  }

  Words words_at(const uint8_t* codes, long at) const {
    if (kStraddles) return straddling(codes, at);
    long bytes = k * Bits / 8, first = at * Bits / 8;
    if (first + (long)sizeof(Words) <= bytes) return load<Words>(codes + first);
    Words words{};
    std::memcpy(&words, codes + first, bytes - first);
    return words;
  }

  Words straddling(const uint8_t* codes, long at) const {
    Words words{};
    for (int i = 0; i < kLanes && at + i < k; i++) {
      long bit = (at + i) * Bits;
      uint32_t two = codes[bit / 8];
      if (bit / 8 + 1 < k * Bits / 8) two |= codes[bit / 8 + 1] << 8;
      words[i] = (two >> (bit % 8)) & ((1u << Bits) - 1);
    }
    return words;
  }

  // Put a row of x into the order that `decode` gives; zero past its end.
  void arrange(const float* x, float* out, long padded) const {
    for (long at = 0; at < padded; at += kBlock)
      for (int lane = 0; lane < kLanes; lane++)
        for (int i = 0; i < kCodes; i++) {
          long from = at + lane * kCodes + i;
          out[at + i * kLanes + lane] = from < k ? x[from] : 0.0f;
        }
  }
};

// ---- The product --------------------------------------------------------------------------------

// y[m][r] += the sum over columns of x[m] and w[r], for M rows of x and R of w.
template <int R, int M>
void dots(const float* w, long w_stride, const float* x, long x_stride, long columns, float* y,
          long y_stride) {
  Floats sums[R][M] = {};
  for (long c = 0; c < columns; c += kLanes) {
    Floats own[R];
    for (int r = 0; r < R; r++) own[r] = load<Floats>(w + r * w_stride + c);
    for (int m = 0; m < M; m++) {
      Floats some = load<Floats>(x + m * x_stride + c);
      for (int r = 0; r < R; r++) sums[r][m] += own[r] * some;
    }
  }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) y[m * y_stride + r] += sum(sums[r][m]);
}

template <int R>
void dots_of(int rows_of_x, const float* w, long w_stride, const float* x, long x_stride,
             long columns, float* y, long y_stride) {
  switch (rows_of_x) {
    case 1: return dots<R, 1>(w, w_stride, x, x_stride, columns, y, y_stride);
    case 2: return dots<R, 2>(w, w_stride, x, x_stride, columns, y, y_stride);
    case 3: return dots<R, std::min(3, kRowsOfX)>(w, w_stride, x, x_stride, columns, y, y_stride);
    default: return dots<R, kRowsOfX>(w, w_stride, x, x_stride, columns, y, y_stride);
  }
}

template <typename F>
struct Product {
  F format;
  const float* x;
  float* y;
  float* arranged;
  long m, n, k, padded;

  void arrange(long row) { format.arrange(x + row * k, arranged + row * padded, padded); }

  // Columns of y from `kTogether` rows of the weight, a few at a time where few rows of x read each.
  void columns(long number) {
    alignas(64) float buffer[kTogether * kColumns];
    long first = number * kTogether, last = std::min(first + kTogether, n);
    for (long i = 0; i < m; i++) std::fill(y + i * n + first, y + i * n + last, 0.0f);
    long together = m <= 2 * kRowsOfX ? kRowsOfW : kTogether;
    for (long start = first; start < last; start += together) {
      long rows = std::min(together, last - start);
      for (long c = 0; c < padded; c += kColumns) {
        long columns = std::min(kColumns, padded - c);
        for (long r = 0; r < rows; r++)
          format.decode(format.row(start + r), c, c + columns, buffer + r * kColumns);
        for (long i = 0; i < m; i += kRowsOfX) {
          int some = (int)std::min<long>(kRowsOfX, m - i);
          const float* own = arranged + i * padded + c;
          float* to = y + i * n + start;
          long r = 0;
          for (; r + kRowsOfW <= rows; r += kRowsOfW)
            dots_of<kRowsOfW>(some, buffer + r * kColumns, kColumns, own, padded, columns, to + r,
                              n);
          for (; r < rows; r++)
            dots_of<1>(some, buffer + r * kColumns, kColumns, own, padded, columns, to + r, n);
        }
      }
    }
  }
};

}  // namespace

// x (m, k) by a packed weight (n, k) into y (m, n), by tasks that `for_each` spreads over threads.
// The build says which format: QGRAPH_BITS, QGRAPH_GROUP, and names of this file as QGRAPH_CODE and
// QGRAPH_SCALE.
// `arranged` has room for kSlab rows of x, or m if they are fewer, each up to kBlock - 1 longer.
extern "C" void qgraph_multiply(ForEach for_each, const float* x, const void* codes,
                                const void* scales, const void* biases, float* y, float* arranged,
                                long m, long n, long k, int threads) {
  using F = Format<QGRAPH_BITS, QGRAPH_GROUP, QGRAPH_CODE, QGRAPH_SCALE>;
  using Stored = F::Stored;
  using P = Product<F>;
  static_assert(F::kBlock <= 256 && kSlab == 512, "as in simd.py");
  F format{(const uint8_t*)codes, (const Stored*)scales, (const Stored*)biases,
           n, k, k / QGRAPH_GROUP};
  long padded = (k + F::kBlock - 1) / F::kBlock * F::kBlock;
  for (long start = 0; start < m; start += kSlab, x += kSlab * k, y += kSlab * n) {
    long rows = std::min(kSlab, m - start);
    P product{format, x, y, arranged, rows, n, k, padded};
    for_each([](void* p, long i) { ((P*)p)->arrange(i); }, &product, rows,
             rows >= 16 ? threads : 1);
    for_each([](void* p, long i) { ((P*)p)->columns(i); }, &product,
             (n + kTogether - 1) / kTogether, threads);
  }
}
