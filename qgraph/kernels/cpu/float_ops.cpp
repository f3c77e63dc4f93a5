// Operations of chains on float32.  Those that are rare call the C library lane by lane.

#include "functions.hpp"
#include "lane_ops.hpp"

namespace qgraph {
namespace {

using Longs = int64_t __attribute__((vector_size(8 * kLanes)));

template <typename F>
void unary(const Lanes& l, F f) {
  for (long i = 0; i < l.count; i += kLanes)
    store((float*)l.to + i, f(load<Floats>((const float*)l.a + i)));
}

template <typename F>
void binary(const Lanes& l, F f) {
  for (long i = 0; i < l.count; i += kLanes)
    store((float*)l.to + i, f(load<Floats>((const float*)l.a + i), load<Floats>((const float*)l.b + i)));
}

// To bool, which is int64 in a register: `f` gives a mask.
template <typename F>
void test(const Lanes& l, F f) {
  for (long i = 0; i < l.count; i += kLanes) {
    Floats a = load<Floats>((const float*)l.a + i);
    Floats b = l.b ? load<Floats>((const float*)l.b + i) : a;
    Ints found = f(a, b) ? Ints{} + 1 : Ints{};
    store((int64_t*)l.to + i, __builtin_convertvector(found, Longs));
  }
}

template <typename F>
void each(const Lanes& l, F f) {
  for (long i = 0; i < l.count; i++) ((float*)l.to)[i] = f(((const float*)l.a)[i]);
}

template <typename F>
void each_pair(const Lanes& l, F f) {
  for (long i = 0; i < l.count; i++)
    ((float*)l.to)[i] = f(((const float*)l.a)[i], ((const float*)l.b)[i]);
}

// NaN is passed on, from either side.
Floats maximum(Floats a, Floats b) { return a != a ? a : a > b ? a : b; }
Floats minimum(Floats a, Floats b) { return a != a ? a : a < b ? a : b; }

// The sign of the divisor, as Python has it.
float remainder_of(float a, float b) {
  float r = std::fmod(a, b);
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}

float log_add_exp(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return NAN;
  float high = a > b ? a : b, low = a > b ? b : a;
  return low == -INFINITY || high == INFINITY ? high : high + std::log1p(std::exp(low - high));
}

// M. Giles, "Approximating the erfinv function" (2010), and one step of Newton's method.
float inverse_error_function(float x) {
  double w = -std::log((1.0 - x) * (1.0 + x)), p;
  if (!(std::fabs(x) < 1)) return std::fabs(x) == 1 ? x * INFINITY : NAN;
  if (w < 5) {
    constexpr double factors[] = {2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06,
                                  0.00021858087, -0.00125372503, -0.00417768164, 0.246640727,
                                  1.50140941};
    w -= 2.5, p = 0;
    for (double f : factors) p = p * w + f;
  } else {
    constexpr double factors[] = {-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844,
                                  0.00573950773, -0.0076224613, 0.00943887047, 1.00167406,
                                  2.83297682};
    w = std::sqrt(w) - 3, p = 0;
    for (double f : factors) p = p * w + f;
  }
  double y = p * x;
  return (float)(y - (std::erf(y) - x) * 0.886226925452758 * std::exp(y * y));
}

void power(const Lanes& l) {
  const float* b = (const float*)l.b;
  bool same = true;
  for (long i = 1; i < l.count && same; i++) same = b[i] == b[0];
  if (same && b[0] == 2) return unary(l, [](Floats a) { return a * a; });
  if (same && b[0] == 3) return unary(l, [](Floats a) { return a * a * a; });
  if (same && b[0] == 0.5f) return each(l, [](float a) { return a == -INFINITY ? INFINITY : std::sqrt(a); });
  each_pair(l, [](float a, float c) { return std::pow(a, c); });
}

#define UNARY(expression) return [](const Lanes& l) { unary(l, [](Floats a) { return expression; }); }
#define BINARY(expression) \
  return [](const Lanes& l) { binary(l, [](Floats a, Floats b) { return expression; }); }
#define TEST(expression) \
  return [](const Lanes& l) { test(l, []([[maybe_unused]] Floats a, [[maybe_unused]] Floats b) { return expression; }); }
#define EACH(expression) return [](const Lanes& l) { each(l, [](float a) -> float { return expression; }); }
#define EACH_PAIR(expression) \
  return [](const Lanes& l) { each_pair(l, [](float a, float b) -> float { return expression; }); }

}  // namespace

LaneOp float_op(int op) {
  switch (op) {
    case QG_OP_ADD: BINARY(a + b);
    case QG_OP_SUBTRACT: BINARY(a - b);
    case QG_OP_MULTIPLY: BINARY(a * b);
    case QG_OP_DIVIDE: BINARY(a / b);
    case QG_OP_MAXIMUM: BINARY(maximum(a, b));
    case QG_OP_MINIMUM: BINARY(minimum(a, b));
    case QG_OP_POWER: return power;
    case QG_OP_REMAINDER: EACH_PAIR(remainder_of(a, b));
    case QG_OP_FLOOR_DIVIDE: EACH_PAIR(std::floor(a / b));
    case QG_OP_ARCTAN2: EACH_PAIR(std::atan2(a, b));
    case QG_OP_LOGADDEXP: EACH_PAIR(log_add_exp(a, b));
    case QG_OP_EQUAL: TEST(a == b);
    case QG_OP_NOT_EQUAL: TEST(a != b);
    case QG_OP_LESS: TEST(a < b);
    case QG_OP_LESS_EQUAL: TEST(a <= b);
    case QG_OP_GREATER: TEST(a > b);
    case QG_OP_GREATER_EQUAL: TEST(a >= b);
    case QG_OP_ISNAN: TEST(a != a);
    case QG_OP_ISINF: TEST(magnitude(a) == INFINITY);
    case QG_OP_ISFINITE: TEST(magnitude(a) < INFINITY);
    case QG_OP_ISPOSINF: TEST(a == INFINITY);
    case QG_OP_ISNEGINF: TEST(a == -INFINITY);
    case QG_OP_ABS: UNARY(magnitude(a));
    case QG_OP_NEGATIVE: UNARY(-a);
    case QG_OP_SIGN: UNARY(a > 0.0f ? all(1.0f) : a < 0.0f ? all(-1.0f) : Floats{});
    case QG_OP_SQUARE: UNARY(a * a);
    case QG_OP_RECIPROCAL: UNARY(1.0f / a);
    case QG_OP_SQRT: UNARY(square_root(a));
    case QG_OP_RSQRT: UNARY(1.0f / square_root(a));
    case QG_OP_EXP: UNARY(exponential(a));
    case QG_OP_EXPM1: EACH(std::expm1(a));
    case QG_OP_LOG: UNARY(logarithm(a));
    case QG_OP_LOG2: EACH(std::log2(a));
    case QG_OP_LOG10: EACH(std::log10(a));
    case QG_OP_LOG1P: EACH(std::log1p(a));
    case QG_OP_SIGMOID: UNARY(sigmoid(a));
    case QG_OP_TANH: UNARY(tangent_h(a));
    case QG_OP_ERF: UNARY(error_function(a));
    case QG_OP_ERFINV: EACH(inverse_error_function(a));
    case QG_OP_SIN:
      return [](const Lanes& l) {
        unary(l, [](Floats a) {
          Floats s, c;
          sine_cosine(a, &s, &c);
          return s;
        });
      };
    case QG_OP_COS:
      return [](const Lanes& l) {
        unary(l, [](Floats a) {
          Floats s, c;
          sine_cosine(a, &s, &c);
          return c;
        });
      };
    case QG_OP_TAN: EACH(std::tan(a));
    case QG_OP_SINH: EACH(std::sinh(a));
    case QG_OP_COSH: EACH(std::cosh(a));
    case QG_OP_ARCSIN: EACH(std::asin(a));
    case QG_OP_ARCCOS: EACH(std::acos(a));
    case QG_OP_ARCTAN: EACH(std::atan(a));
    case QG_OP_ARCSINH: EACH(std::asinh(a));
    case QG_OP_ARCCOSH: EACH(std::acosh(a));
    case QG_OP_ARCTANH: EACH(std::atanh(a));
    case QG_OP_FLOOR: EACH(std::floor(a));
    case QG_OP_CEIL: EACH(std::ceil(a));
    case QG_OP_ROUND: EACH(std::rint(a));
    case QG_OP_TRUNC: EACH(std::trunc(a));
    case QG_OP_FMA:
      return [](const Lanes& l) {
        const float *a = (const float*)l.a, *b = (const float*)l.b, *c = (const float*)l.c;
#if defined(__FMA__) || defined(__aarch64__)
        for (long i = 0; i < l.count; i += kLanes)  // the compiler makes one instruction of both
          store((float*)l.to + i, load<Floats>(a + i) * load<Floats>(b + i) + load<Floats>(c + i));
#else
        for (long i = 0; i < l.count; i++) ((float*)l.to)[i] = std::fma(a[i], b[i], c[i]);
#endif
      };
    case QG_OP_SILU: UNARY(silu(a));
    case QG_OP_GELU: UNARY(gelu(a));
    case QG_OP_GELU_TANH: UNARY(gelu_tanh(a));
    case QG_OP_RELU: UNARY(maximum(a, Floats{}));
    default: return nullptr;
  }
}

}  // namespace qgraph
