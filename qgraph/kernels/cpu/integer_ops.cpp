// Operations of chains on integers and bool, each lane an int64; results wrap to their dtype after.

#pragma GCC optimize("O3")  // loops over lanes become vectors

#include <cstdint>

#include "lane_ops.hpp"

namespace qgraph {
namespace {

template <typename T, typename F>
void binary(const Lanes& l, F f) {
  const T *a = (const T*)l.a, *b = (const T*)l.b;
  for (long i = 0; i < l.count; i++) ((T*)l.to)[i] = f(a[i], b[i]);
}

template <typename T>
T divided(T a, T b) {  // rounded down
  if (b == 0) return 0;
  if (b == (T)-1 && (T)-1 < 0) return (T)(0 - (uint64_t)a);
  T q = a / b;
  return a % b != 0 && (a % b < 0) != (b < 0) ? q - 1 : q;
}

template <typename T>
T power(T a, T b) {
  uint64_t result = 1, base = (uint64_t)a;
  if (b < 0) return a == 1 ? 1 : a == (T)-1 ? ((b & 1) ? a : 1) : 0;
  for (uint64_t left = (uint64_t)b; left; left >>= 1, base *= base)
    if (left & 1) result *= base;
  return (T)result;
}

inline uint64_t bits_of(int dtype) {
  switch (dtype) {
    case QG_BOOL: case QG_U8: case QG_I8: return 8;
    case QG_U16: case QG_I16: return 16;
    case QG_U32: case QG_I32: return 32;
    default: return 64;
  }
}

#define BINARY(expression) \
  return [](const Lanes& l) { binary<T>(l, []([[maybe_unused]] T a, [[maybe_unused]] T b) -> T { return expression; }); }
// Sums and products wrap: computed without a sign.
#define WRAPPING(op) BINARY((T)((uint64_t)a op (uint64_t)b))
#define UNARY(expression) \
  return [](const Lanes& l) { Lanes m = l; m.b = l.a; binary<T>(m, [](T a, T) -> T { return expression; }); }

template <typename T>
LaneOp of_type(int op, int dtype) {
  bool is_bool = dtype == QG_BOOL;
  switch (op) {
    case QG_OP_ADD: if (is_bool) BINARY(a | b); WRAPPING(+);
    case QG_OP_SUBTRACT: WRAPPING(-);
    case QG_OP_MULTIPLY: WRAPPING(*);
    case QG_OP_MAXIMUM: case QG_OP_RELU: BINARY(a > b ? a : b);
    case QG_OP_MINIMUM: BINARY(a < b ? a : b);
    case QG_OP_POWER: BINARY(power(a, b));
    case QG_OP_REMAINDER: BINARY(b == 0 ? 0 : (T)((uint64_t)a - (uint64_t)divided(a, b) * (uint64_t)b));
    case QG_OP_FLOOR_DIVIDE: BINARY(divided(a, b));
    case QG_OP_EQUAL: BINARY(a == b);
    case QG_OP_NOT_EQUAL: BINARY(a != b);
    case QG_OP_LESS: BINARY(a < b);
    case QG_OP_LESS_EQUAL: BINARY(a <= b);
    case QG_OP_GREATER: BINARY(a > b);
    case QG_OP_GREATER_EQUAL: BINARY(a >= b);
    case QG_OP_LOGICAL_AND: BINARY(a && b);
    case QG_OP_LOGICAL_OR: BINARY(a || b);
    case QG_OP_LOGICAL_NOT: UNARY(!a);
    case QG_OP_BITWISE_AND: BINARY(a & b);
    case QG_OP_BITWISE_OR: BINARY(a | b);
    case QG_OP_BITWISE_XOR: BINARY(a ^ b);
    case QG_OP_BITWISE_INVERT: if (is_bool) UNARY(!a); UNARY(~a);
    case QG_OP_LEFT_SHIFT:
      return [](const Lanes& l) {
        uint64_t bits = bits_of(l.dtype);
        binary<T>(l, [bits](T a, T b) -> T { return (uint64_t)b < bits ? (T)((uint64_t)a << b) : 0; });
      };
    case QG_OP_RIGHT_SHIFT:
      return [](const Lanes& l) {
        uint64_t bits = bits_of(l.dtype);
        binary<T>(l, [bits](T a, T b) -> T { return (uint64_t)b < bits ? a >> b : a < 0 ? (T)-1 : 0; });
      };
    case QG_OP_ABS: UNARY(a < 0 ? (T)(0 - (uint64_t)a) : a);
    case QG_OP_NEGATIVE: UNARY((T)(0 - (uint64_t)a));
    case QG_OP_SIGN: UNARY(a > 0 ? 1 : a < 0 ? (T)-1 : 0);
    case QG_OP_SQUARE: UNARY((T)((uint64_t)a * (uint64_t)a));
    case QG_OP_FLOOR: case QG_OP_CEIL: case QG_OP_ROUND: case QG_OP_TRUNC: UNARY(a);
    case QG_OP_ISNAN: case QG_OP_ISINF: case QG_OP_ISPOSINF: case QG_OP_ISNEGINF: UNARY(a & 0);
    case QG_OP_ISFINITE: UNARY((a & 0) | 1);
    default: return nullptr;
  }
}

}  // namespace

LaneOp integer_op(int op, int dtype) {
  if (op == QG_OP_RELU) return nullptr;
  return dtype == QG_U64 ? of_type<uint64_t>(op, dtype) : of_type<int64_t>(op, dtype);
}

}  // namespace qgraph
