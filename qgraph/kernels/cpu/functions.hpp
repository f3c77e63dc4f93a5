// Functions of float32 in vectors, to an ulp or two.  Coefficients: of Cephes (S. L. Moshier) for
// exp, log, sin, cos and tanh; of least squares against float64 for erf.
#pragma once

#include <cmath>

#include "lanes.hpp"

namespace qgraph {

inline Floats magnitude(Floats x) { return as_floats(as_words(x) & 0x7fffffffu); }

// `y` with the sign of `x`.
inline Floats with_sign(Floats y, Floats x) {
  return as_floats((as_words(y) & 0x7fffffffu) | (as_words(x) & 0x80000000u));
}

template <int N>
inline Floats polynomial(Floats x, const float (&factors)[N]) {
  Floats y = all(factors[0]);
  QG_UNROLLED
  for (int i = 1; i < N; i++) y = y * x + factors[i];
  return y;
}

inline Floats square_root(Floats x) {
  for (int i = 0; i < kLanes; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// The nearest whole number of |x| < 2^22, of two the even one.
inline Floats nearest(Floats x) {
  constexpr float kShift = 0x1.8p23f;
  Floats y = x + kShift;
  return y - kShift;
}

// y 2^n for whole n; 2^n may be a denormal, or too large.
inline Floats times_power_of_two(Floats y, Floats n) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  using Floats16 = float __attribute__((vector_size(64)));
  return (Floats)__builtin_ia32_scalefps512_mask((Floats16)y, (Floats16)n, Floats16{}, (uint16_t)-1, 4);
#else
  Ints whole = __builtin_convertvector(n, Ints), half = whole >> 1;
  auto power = [](Ints i) { return as_floats((i + 127) << 23); };
  return y * power(half) * power(whole - half);
#endif
}

// e^x = 2^n e^r with |r| <= ln(2) / 2.  NaN passes through.
inline Floats exponential(Floats x) {
  Floats kept = larger(all(-104.0f), smaller(all(89.0f), x));
  Floats whole = nearest(kept * 1.44269504f);
  Floats r = (kept - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats y = polynomial(r, {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                            1.6666665459e-1f, 5.0000001201e-1f});
  return times_power_of_two(y * r * r + r + 1.0f, whole);
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

inline Floats silu(Floats x) { return x * sigmoid(x); }

inline Floats tangent_h(Floats x) {
  Floats a = magnitude(x), z = x * x;
  Floats small = polynomial(z, {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                                1.33314422036e-1f, -3.33332819422e-1f});
  small = small * z * x + x;
  Floats large = 1.0f - 2.0f / (exponential(a + a) + 1.0f);
  return a < 0.625f ? small : with_sign(large, x);
}

inline Floats error_function(Floats x) {
  Floats a = magnitude(x), z = x * x;
  Floats small = x * polynomial(z, {-9.67359392e-6f, 1.12682581e-4f, -8.48439755e-4f,
                                    5.22105349e-3f, -2.68654376e-2f, 1.12837829e-1f,
                                    -3.76126379e-1f, 1.12837923f});
  Floats t = (a > 4.0f ? all(4.0f) : a) - 2.5f;  // erf x = 1 - e^-p
  Floats p = polynomial(t, {2.17891429e-5f, -6.12840595e-5f, 4.31962311e-4f, -2.16560578e-3f,
                            1.08537618e-2f, 9.43891764e-1f, 5.35268068f, 7.80681515f});
  Floats y = a < 1.0f ? small : with_sign(1.0f - exponential(-p), x);
  return x == x ? y : x;
}

inline Floats gelu(Floats x) { return x * (0.5f + 0.5f * error_function(x * 0.707106781f)); }

inline Floats gelu_tanh(Floats x) {
  return 0.5f * x * (1.0f + tangent_h(0.797884561f * (x + 0.044715f * x * x * x)));
}

inline Floats logarithm(Floats x) {
  Floats scaled = x < 0x1p-126f ? x * 0x1p23f : x;
  Words bits = as_words(scaled);
  Floats exponent = converted((Ints)(bits >> 23) - 126);
  exponent = x < 0x1p-126f ? exponent - 23.0f : exponent;
  Floats m = as_floats((bits & 0x007fffffu) | 0x3f000000u);  // in [0.5, 1)
  auto low = m < 0.707106781f;
  exponent = low ? exponent - 1.0f : exponent;
  m = (low ? m + m : m) - 1.0f;
  Floats z = m * m;
  Floats y = polynomial(m, {7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f,
                            -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                            2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f});
  y = y * m * z - exponent * 2.12194440e-4f - 0.5f * z;
  y = (m + y) + exponent * 0.693359375f;
  y = x == INFINITY ? x : y;
  y = x == 0.0f ? all(-INFINITY) : y;
  return x >= 0.0f ? y : all(NAN);
}

// sin x and cos x: x less a multiple of pi / 2, found in double precision.
inline void sine_cosine(Floats x, Floats* sine, Floats* cosine) {
  using Doubles = double __attribute__((vector_size(8 * kLanes)));
  using Longs = int64_t __attribute__((vector_size(8 * kLanes)));
  constexpr double kShift = 0x1.8p52;
  Doubles wide = __builtin_convertvector(x, Doubles);
  Doubles turns = wide * 0.63661977236758134 + kShift;
  turns -= kShift;
  Floats r = __builtin_convertvector(
      (wide - turns * 1.5707963267948966) - turns * 6.123233995736766e-17, Floats);
  Ints quarter = __builtin_convertvector(__builtin_convertvector(turns, Longs), Ints);
  Floats z = r * r;
  Floats s = polynomial(z, {-1.9515295891e-4f, 8.3321608736e-3f, -1.6666654611e-1f}) * z * r + r;
  Floats c = polynomial(z, {2.443315711809948e-5f, -1.388731625493765e-3f,
                            4.166664568298827e-2f}) * z * z - 0.5f * z + 1.0f;
  auto odd = (quarter & 1) != 0;
  Words minus_s = (Words)(quarter & 2) << 30, minus_c = (Words)((quarter + 1) & 2) << 30;
  *sine = as_floats(as_words(odd ? c : s) ^ minus_s);
  *cosine = as_floats(as_words(odd ? s : c) ^ minus_c);
  for (int i = 0; i < kLanes; i++)
    if (!(std::fabs(x[i]) < 1e8f)) (*sine)[i] = std::sin(x[i]), (*cosine)[i] = std::cos(x[i]);
}

}  // namespace qgraph
