// Elements of any dtype in registers: float32 for floats, int64 for integers and bool.
#pragma once

#include "lanes.hpp"

namespace qgraph {

// Calls `f` with the C++ type of an integer dtype.
template <typename F>
inline void of_integer(int dtype, F f) {
  switch (dtype) {
    case QG_BOOL: case QG_U8: return f(uint8_t{});
    case QG_I8: return f(int8_t{});
    case QG_U16: return f(uint16_t{});
    case QG_I16: return f(int16_t{});
    case QG_U32: return f(uint32_t{});
    case QG_I32: return f(int32_t{});
    default: return f(int64_t{});
  }
}

inline void read_integers(int dtype, const char* from, long step, int64_t* to, long count) {
  of_integer(dtype, [&](auto type) {
    using T = decltype(type);
    const T* own = (const T*)from;
    for (long i = 0; i < count; i++) to[i] = own[i * step];
  });
}

// What does not fit is cut off; of bool anything but 0 is 1.
inline void write_integers(int dtype, const int64_t* from, char* to, long step, long count) {
  if (dtype == QG_BOOL) {
    for (long i = 0; i < count; i++) to[i * step] = from[i] != 0;
    return;
  }
  of_integer(dtype, [&](auto type) {
    using T = decltype(type);
    for (long i = 0; i < count; i++) ((T*)to)[i * step] = (T)from[i];
  });
}

// Turns the order of uint64 into that of int64, and back.
inline void turn_sign(int dtype, int64_t* x, long count) {
  if (dtype != QG_U64) return;
  for (long i = 0; i < count; i++) x[i] = (int64_t)((uint64_t)x[i] ^ (1ull << 63));
}

}  // namespace qgraph
