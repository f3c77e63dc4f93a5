// CUDA's 16-bit floats and what is done with their bits, on a CPU.

#pragma once

#include "cuda_on_cpu.hpp"

inline unsigned __float_as_uint(float number) {
  unsigned bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}

inline float __uint_as_float(unsigned bits) { return __int_as_float(int(bits)); }

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  unsigned d = 0;
  for (int i = 0; i < 4; i++) {
    const int from = selector >> 4 * i & 7;
    d |= (from < 4 ? a >> 8 * from : b >> 8 * (from - 4)) % 256 << 8 * i;
  }
  return d;
}

// A float of 16 bits: so many for the mantissa, and the smallest exponent.
template <int MANTISSA, int LEAST>
struct Float16 {
  unsigned short bits = 0;

  Float16() = default;
  explicit Float16(double v) {
    const unsigned sign = std::signbit(v) ? 0x8000 : 0;
    const unsigned infinity = (1u << 15) - (1u << MANTISSA);
    if (std::isnan(v)) {
      bits = sign | infinity | 1u << (MANTISSA - 1);
      return;
    }
    v = std::fabs(v);
    int exponent = v > 0 && std::isfinite(v) ? std::ilogb(v) : LEAST;
    exponent = max(exponent, LEAST);
    // A number that is rounded up to the next power of two, or out of the subnormal ones, carries.
    const double units = std::isinf(v) ? 1e9 : std::nearbyint(std::ldexp(v, MANTISSA - exponent));
    const double all = std::ldexp(double(exponent - LEAST), MANTISSA) + units;
    bits = sign | unsigned(min(all, double(infinity)));
  }
  explicit operator float() const {
    const int exponent = (bits & 0x7fff) >> MANTISSA, top = (1 << (15 - MANTISSA)) - 1;
    const int rest = bits & ((1 << MANTISSA) - 1);
    double v = exponent == 0 ? std::ldexp(rest, LEAST - MANTISSA)
                             : std::ldexp(rest + (1 << MANTISSA), exponent - 1 + LEAST - MANTISSA);
    if (exponent == top) v = rest ? NAN : INFINITY;
    return bits & 0x8000 ? -v : v;
  }
};
using __nv_bfloat16 = Float16<7, -126>;
using __half = Float16<10, -14>;

#include "../../qgraph/kernels/cuda/words.cuh"
