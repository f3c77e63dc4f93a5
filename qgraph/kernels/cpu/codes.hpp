// Packed weights: how codes lie in words, what they stand for, and their scales.
//
// A row is one little-endian stream of bits.  A unit is the fewest whole bytes of whole codes that
// fit a lane or two: four or more codes.  A lane takes one unit, so a register takes the
// units of a stretch of a row (few_rows.cpp), or one unit of each of several rows (panels.cpp).
//
// Formats: OCP Microscaling Formats (MX) v1.0 for E2M1, E4M3 and E8M0.
#pragma once

#include "lanes.hpp"
#include "region.h"

namespace qgraph {

inline Floats looked_up(const float* table, int entries, Words codes) {
  if (entries <= kLanes) return __builtin_shuffle(load<Floats>(table), (Ints)codes);
  return __builtin_shuffle(load<Floats>(table), load<Floats>(table + kLanes), (Ints)codes);
}

// Integers, less `kCentre`: half their range.  The sum of a group's products is then small where
// the weights are, so that scale and bias can be applied to sums without loss.
template <int B>
struct Integer {
  static constexpr int kBits = B;
  static constexpr bool kBiased = true;
  static constexpr float kCentre = 1 << (B - 1);
  static constexpr bool kLooksUp = (1 << B) <= 2 * kLanes && kLanes >= 8;

  alignas(64) float table[2 * kLanes];

  Integer() {
    for (int i = 0; i < 2 * kLanes; i++) table[i] = i % (1 << B) - kCentre;
  }

  // Of the low bits of each lane; those above are of other codes.
  Floats value(Words low) const {
    // A table of fewer entries than lanes stands there several times: higher bits do not matter.
    if constexpr (kLooksUp) return looked_up(table, 1 << B, low);
    return as_floats((low & ((1u << B) - 1)) | 0x4b000000u) - (0x1p23f + kCentre);
  }
};

struct E2M1 {
  static constexpr int kBits = 4;
  static constexpr bool kBiased = false;
  static constexpr float kCentre = 0;

  alignas(64) float table[16];

  E2M1() {
    constexpr float magnitudes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    for (int i = 0; i < 16; i++) table[i] = i < 8 ? magnitudes[i] : -magnitudes[i - 8];
  }

  Floats value(Words low) const {
    if constexpr (kLanes >= 8) return looked_up(table, 16, low);
    Words sign = (low & 8) << 28, exponent = (low >> 1) & 3, mantissa = low & 1;
    Floats small = converted((Ints)mantissa) * 0.5f;
    Words bits = exponent == 0 ? as_words(small) : ((exponent + 126) << 23) | (mantissa << 22);
    return as_floats(bits | sign);
  }
};

struct E4M3 {
  static constexpr int kBits = 8;
  static constexpr bool kBiased = false;
  static constexpr float kCentre = 0;

  Floats value(Words low) const {
    Words magnitude = low & 127, sign = (low & 128) << 24;
    Floats small = converted((Ints)magnitude) * 0x1p-9f;  // exponent 0: multiples of 2^-9
    Words bits = magnitude < 8 ? as_words(small) : (magnitude << 20) + (120u << 23);
    bits = magnitude == 127 ? Words{} + 0x7fc00000u : bits;
    return as_floats(bits | sign);
  }
};

inline Floats e8m0(Words code) {
  Words bits = code == 0 ? Words{} + 0x00400000u : code << 23;  // 2^-127 is a denormal
  return as_floats(code == 255 ? Words{} + 0x7fc00000u : bits);
}

// The words of a unit in each lane, and the codes in them.
template <typename Code>
struct Units {
  static constexpr int kBits = Code::kBits;
  static constexpr int kBytes = kBits == 3 || kBits == 6 ? 3 : kBits == 5 ? 5 : 4;
  static constexpr int kCodes = 8 * kBytes / kBits;
  static constexpr int kBlock = kLanes * kCodes;  // elements of a register's units

  Words first, second;  // second: from the second byte on, where a unit is longer than a word

  template <int i>
  Words low_bits() const {
    if constexpr (kBytes == 5 && i >= 6) return second >> (kBits * i - 8);
    return first >> (kBits * i);
  }

  // Four bytes at each of some offsets.
  static Words gathered(const uint8_t* from, Ints offsets) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    using Ints16 = int __attribute__((vector_size(64)));
    return (Words)__builtin_ia32_gathersiv16si(Ints16{}, from, (Ints16)offsets, (uint16_t)-1, 1);
#elif defined(__AVX2__)
    using Ints8 = int __attribute__((vector_size(32)));
    return (Words)__builtin_ia32_gathersiv8si(Ints8{}, (const int*)from, (Ints8)offsets,
                                              ~Ints8{}, 1);
#else
    Words words;
    for (int i = 0; i < kLanes; i++) words[i] = load<uint32_t>(from + offsets[i]);
    return words;
#endif
  }

  // A unit at each offset.  `inside`: bytes before the first of all belong to the weight, so that a
  // unit of three bytes is read from the byte before it and nothing past its end is touched.
  static Units at(const uint8_t* from, Ints offsets, bool inside) {
    if constexpr (kBytes == 3) {
      if (inside) return {gathered(from - 1, offsets) >> 8, Words{}};
      return {gathered(from, offsets), Words{}};
    }
    Units units{gathered(from, offsets), Words{}};
    if constexpr (kBytes == 5) units.second = gathered(from + 1, offsets);
    return units;
  }

  // Of the first `some` lanes; the others become zero.
  void keep(long some) {
    constexpr Ints lane = lanes_of([](int i) { return i; });
    Words kept = (Words)(lane < (int)some);
    first &= kept;
    second &= kept;
  }

  // The next `some` units, where no more can be read.
  __attribute__((noinline)) static Units last(const uint8_t* from, long some) {
    uint8_t copy[kLanes * kBytes + 4] = {};
    std::memcpy(copy, from, some * kBytes);
    return whole(copy);
  }

  // The next kLanes units, and a byte after them can be read.
  static Units whole(const uint8_t* from) {
    if constexpr (kBytes == 4) return {load<Words>(from), Words{}};
    constexpr Ints offsets = lanes_of([](int i) { return i * kBytes; });
    return at(from, offsets, false);
  }
};

// Elements of the scales of float modes.
struct ScaleE8M0 {
  using Stored = uint8_t;
  static Floats load(const Stored* from) {
    return e8m0(__builtin_convertvector(qgraph::load<Bytes>(from), Words));
  }
};

struct ScaleE4M3 {
  using Stored = uint8_t;
  static Floats load(const Stored* from) {
    return E4M3{}.value(__builtin_convertvector(qgraph::load<Bytes>(from), Words));
  }
};

// Calls `f` with the type of the scales.
template <typename F>
inline auto of_scale(long mode, int dtype, F f) {
  if (mode == QG_NVFP4) return f(ScaleE4M3{});
  if (mode != QG_AFFINE) return f(ScaleE8M0{});
  return of_float(dtype, f);
}

// Calls `f` with the code type of a mode and number of bits; false if there is none.
template <typename F>
inline bool of_code(long mode, long bits, F f) {
  if (mode == QG_MXFP4 || mode == QG_NVFP4) return f(E2M1{}), true;
  if (mode == QG_MXFP8) return f(E4M3{}), true;
  switch (mode == QG_AFFINE ? bits : 0) {
    case 2: return f(Integer<2>{}), true;
    case 3: return f(Integer<3>{}), true;
    case 4: return f(Integer<4>{}), true;
    case 5: return f(Integer<5>{}), true;
    case 6: return f(Integer<6>{}), true;
    case 8: return f(Integer<8>{}), true;
  }
  return false;
}

inline long scale_size(long mode, int dtype) { return mode == QG_AFFINE ? size_of(dtype) : 1; }

}  // namespace qgraph
