// Vectors of CUDA, and two 16-bit floats in a word as `tiled/instructions.cuh` has them, on a CPU.

#pragma once

#include "half_on_cpu.hpp"

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace qgraph {
namespace tiled {

template <typename T>
T number(unsigned word, int half) {
  T v;
  v.bits = word >> 16 * half;
  return v;
}

template <typename T>
struct Half {
  static constexpr bool bfloat = std::is_same_v<T, __nv_bfloat16>;
  static constexpr float unit = bfloat ? 0x1p32f : 1;
  static unsigned fma(unsigned a, unsigned b, unsigned c) {
    unsigned d = 0;
    for (int h = 0; h < 2; h++) {
      const double product = double(float(number<T>(a, h))) * float(number<T>(b, h));
      d |= unsigned(T(product + float(number<T>(c, h))).bits) << 16 * h;
    }
    return d;
  }
};

template <typename T>
unsigned times(unsigned a, unsigned b) {
  return Half<T>::fma(a, b, 0x80008000);
}

template <typename T>
unsigned larger(unsigned a, unsigned b) {
  unsigned d = 0;
  for (int h = 0; h < 2; h++) {
    const T x = number<T>(a, h), y = number<T>(b, h);
    d |= unsigned((float(x) > float(y) ? x : y).bits) << 16 * h;
  }
  return d;
}

template <int SHIFT, unsigned MASK>
unsigned masked(unsigned word, unsigned rest) {
  return ((SHIFT >= 0 ? word >> (SHIFT & 31) : word << (-SHIFT & 31)) & MASK) | rest;
}

}  // namespace tiled
}  // namespace qgraph
