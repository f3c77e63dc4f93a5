// Vectors as wide as the processor's registers.

#include <cstdint>
#include <cstring>

// `qgraph_for_each` of pool.cpp.
using ForEach = void (*)(void (*task)(void*, long), void* data, long count, int threads);

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));

template <typename V, typename T>
V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <typename V>
Floats as_floats(V bits) {
  Floats v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

[[maybe_unused]] Floats converted(Words integers) {
  return __builtin_convertvector((Ints)integers, Floats);
}

[[maybe_unused]] float sum(Floats v) {
  for (int step = kLanes / 2; step > 0; step /= 2) {
    Ints across;
    for (int i = 0; i < kLanes; i++) across[i] = i ^ step;
    v += __builtin_shuffle(v, across);
  }
  return v[0];
}

}  // namespace
