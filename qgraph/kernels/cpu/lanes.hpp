// Vectors as wide as the processor's registers, and half precision read and written through them.
//
// GCC's vector extension makes one source for all processors.  What has no operator (half
// precision) stands here, with a plain form for processors whose instructions are not named.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "region.h"

// Loops over registers must leave no loop.
#define QG_UNROLLED _Pragma("GCC unroll 16")

namespace qgraph {

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // NEON
#endif

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Shorts = uint16_t __attribute__((vector_size(2 * kLanes)));
using Bytes = uint8_t __attribute__((vector_size(kLanes)));

template <typename V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <typename V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

// The first `count` lanes; the others are zero.
template <typename V>
inline V load_some(const void* from, long count) {
  V v{};
  std::memcpy(&v, from, count * sizeof(v[0]));
  return v;
}

template <typename V>
inline Floats as_floats(V bits) {
  Floats v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

inline Words as_words(Floats v) { return load<Words>(&v); }

inline Floats all(float x) { return x - Floats{}; }  // x + 0 would be computed: -0 + 0 is 0

inline Floats converted(Ints integers) { return __builtin_convertvector(integers, Floats); }

// The second where one is NaN.
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

// A vector of f(0), f(1), …
template <typename F, int... i>
constexpr Ints lanes_of(F f, std::integer_sequence<int, i...>) {
  return Ints{f(i)...};
}

template <typename F>
constexpr Ints lanes_of(F f) {
  return lanes_of(f, std::make_integer_sequence<int, kLanes>());
}

template <int step>
inline Floats across(Floats v) {
  constexpr Ints order = lanes_of([](int i) { return i ^ step; });
  return __builtin_shuffle(v, order);
}

inline float sum(Floats v) {
  if constexpr (kLanes > 8) v += across<8>(v);
  if constexpr (kLanes > 4) v += across<4>(v);
  v += across<2>(v);
  return (v + across<1>(v))[0];
}

// Sums of neighbours: first those of a, then those of b.
inline Floats pairs(Floats a, Floats b) {
  constexpr Ints even = lanes_of([](int i) { return 2 * i; });
  constexpr Ints odd = lanes_of([](int i) { return 2 * i + 1; });
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

inline float largest(Floats v) {
  if constexpr (kLanes > 8) v = larger(v, across<8>(v));
  if constexpr (kLanes > 4) v = larger(v, across<4>(v));
  v = larger(v, across<2>(v));
  return larger(v, across<1>(v))[0];
}

// ---- Half precision ---------------------------------------------------------------------------

inline Floats from_bfloat16(Shorts bits) {
  return as_floats(__builtin_convertvector(bits, Words) << 16);
}

// To the nearest, of two to the even one; NaN stays NaN.
inline Shorts to_bfloat16(Floats x) {
  Words bits = as_words(x);
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Words nan = (bits >> 16) | 0x40;
  return __builtin_convertvector(x != x ? nan : rounded, Shorts);
}

inline Floats from_float16(Shorts bits) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  using Floats16 = float __attribute__((vector_size(64)));
  using Shorts16 = short __attribute__((vector_size(32)));
  return (Floats)__builtin_ia32_vcvtph2ps512_mask((Shorts16)bits, Floats16{}, (uint16_t)-1, 4);
#elif defined(__AVX2__) && defined(__F16C__)
  using Shorts8 = short __attribute__((vector_size(16)));
  return (Floats)__builtin_ia32_vcvtph2ps256((Shorts8)bits);
#elif defined(__aarch64__)
  __fp16 halves[kLanes];
  std::memcpy(halves, &bits, sizeof(bits));
  Floats v{};
  for (int i = 0; i < kLanes; i++) v[i] = (float)halves[i];
  return v;
#else
  Words wide = __builtin_convertvector(bits, Words);
  Words sign = (wide & 0x8000) << 16, magnitude = wide & 0x7fff;
  Floats small = converted((Ints)magnitude) * 0x1p-24f;
  Words normal = (magnitude << 13) + (112u << 23);
  normal = magnitude >= 0x7c00 ? normal + (112u << 23) : normal;  // infinities and NaN
  return as_floats((magnitude < 0x400 ? as_words(small) : normal) | sign);
#endif
}

inline Shorts to_float16(Floats x) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  using Floats16 = float __attribute__((vector_size(64)));
  using Shorts16 = short __attribute__((vector_size(32)));
  return (Shorts)__builtin_ia32_vcvtps2ph512_mask((Floats16)x, 0, Shorts16{}, (uint16_t)-1);
#elif defined(__AVX2__) && defined(__F16C__)
  using Floats8 = float __attribute__((vector_size(32)));
  return (Shorts)__builtin_ia32_vcvtps2ph256((Floats8)x, 0);
#elif defined(__aarch64__)
  __fp16 halves[kLanes];
  for (int i = 0; i < kLanes; i++) halves[i] = (__fp16)x[i];
  return load<Shorts>(halves);
#else
  Words bits = as_words(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  Words normal = magnitude - (112u << 23);
  normal = (normal + 0xfff + ((normal >> 13) & 1)) >> 13;
  // Adding 0.5 leaves the multiples of 2^-24 in the last bits.
  Words small = as_words(as_floats(magnitude) + 0.5f) - 0x3f000000;
  Words half = magnitude < (113u << 23) ? small : normal;
  half = magnitude >= 0x477ff000 ? Words{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? Words{} + 0x7e00 : half;
  return __builtin_convertvector(half | sign, Shorts);
#endif
}

// ---- Elements of a float dtype ------------------------------------------------------------------

struct Float32 {
  using Stored = float;
  static Floats load(const Stored* from) { return qgraph::load<Floats>(from); }
  static void store(Stored* to, Floats x) { qgraph::store(to, x); }
};

struct Float16 {
  using Stored = uint16_t;
  static Floats load(const Stored* from) { return from_float16(qgraph::load<Shorts>(from)); }
  static void store(Stored* to, Floats x) { qgraph::store(to, to_float16(x)); }
};

struct BFloat16 {
  using Stored = uint16_t;
  static Floats load(const Stored* from) { return from_bfloat16(qgraph::load<Shorts>(from)); }
  static void store(Stored* to, Floats x) { qgraph::store(to, to_bfloat16(x)); }
};

// The first `count` lanes of elements, the others zero; what lies before `end` may be read.
template <typename D>
inline Floats load_part(const typename D::Stored* from, long count, const void* end) {
  constexpr Ints lane = lanes_of([](int i) { return i; });
  Floats x;
  if ((const char*)(from + kLanes) <= (const char*)end) {
    x = D::load(from);
  } else {
    typename D::Stored few[kLanes] = {};
    for (long i = 0; i < count && i < kLanes; i++) few[i] = from[i];
    x = D::load(few);
  }
  return lane < (int)count ? x : Floats{};
}

// Calls `f` with the type of a float dtype.
template <typename F>
inline auto of_float(int dtype, F f) {
  if (dtype == QG_F16) return f(Float16{});
  if (dtype == QG_BF16) return f(BFloat16{});
  return f(Float32{});
}

// Reads `count` elements, `step` apart, as float32.
template <typename D>
inline void widen(const typename D::Stored* from, long step, float* to, long count) {
  long i = 0;
  if (step == 1)
    for (; i + kLanes <= count; i += kLanes) store(to + i, D::load(from + i));
  for (; i < count; i += kLanes) {
    long some = count - i < kLanes ? count - i : kLanes;
    typename D::Stored few[kLanes] = {};
    for (long j = 0; j < some; j++) few[j] = from[(i + j) * step];
    Floats x = D::load(few);
    std::memcpy(to + i, &x, some * sizeof(float));
  }
}

void widen(int dtype, const void* from, long step, float* to, long count);

// Writes `count` float32 numbers as elements, `step` apart.
template <typename D>
inline void narrow(const float* from, typename D::Stored* to, long step, long count) {
  long i = 0;
  if (step == 1)
    for (; i + kLanes <= count; i += kLanes) D::store(to + i, load<Floats>(from + i));
  for (; i < count; i += kLanes) {
    long some = count - i < kLanes ? count - i : kLanes;
    typename D::Stored few[kLanes];
    D::store(few, load_some<Floats>(from + i, some));
    for (long j = 0; j < some; j++) to[(i + j) * step] = few[j];
  }
}

void narrow(int dtype, const float* from, void* to, long step, long count);

inline Floats rounded(int dtype, Floats x) {
  if (dtype == QG_F16) return from_float16(to_float16(x));
  if (dtype == QG_BF16) return from_bfloat16(to_bfloat16(x));
  return x;
}

inline long size_of(int dtype) {
  switch (dtype) {
    case QG_BOOL: case QG_U8: case QG_I8: return 1;
    case QG_U16: case QG_I16: case QG_F16: case QG_BF16: return 2;
    case QG_U64: case QG_I64: return 8;
    default: return 4;
  }
}

inline bool is_float(int dtype) { return dtype >= QG_F16 && dtype <= QG_F32; }

inline int64_t integer_at(int dtype, const void* from) {
  switch (dtype) {
    case QG_BOOL: case QG_U8: return *(const uint8_t*)from;
    case QG_I8: return *(const int8_t*)from;
    case QG_U16: return load<uint16_t>(from);
    case QG_I16: return load<int16_t>(from);
    case QG_U32: return load<uint32_t>(from);
    case QG_I32: return load<int32_t>(from);
    case QG_U64: {
      uint64_t x = load<uint64_t>(from);
      return x > INT64_MAX ? INT64_MAX : (int64_t)x;
    }
    default: return load<int64_t>(from);
  }
}

}  // namespace qgraph
