// Numbers as they are in memory, and as float32.

namespace qgraph {
namespace phases {

// Of 16 bits.
template <typename T>
__device__ __forceinline__ float number(unsigned bits) {
  const unsigned short low = bits;
  return float(*reinterpret_cast<const T*>(&low));
}

// A number as it is in T.
template <typename T>
__device__ __forceinline__ float rounded(float v) {
  return float(T(v));
}

// Neighbours that are moved at a time.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <typename T>
struct Sixteen {  // bytes, as numbers
  static constexpr int COUNT = 16 / sizeof(T);
  float v[COUNT];

  __device__ Sixteen() {}
  __device__ __forceinline__ explicit Sixteen(const uint4& from) {
    const unsigned words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      if constexpr (sizeof(T) == 4)
        v[i] = __uint_as_float(words[i]);
      else
        v[i] = number<T>(words[i / 2] >> 16 * (i % 2));
  }
  __device__ __forceinline__ void store(T* to) const {
    Pack<T, COUNT> all;
#pragma unroll
    for (int i = 0; i < COUNT; i++) all.v[i] = T(v[i]);
    *reinterpret_cast<Pack<T, COUNT>*>(to) = all;
  }
};

template <typename T>
__device__ __forceinline__ uint4 load_16(const T* from, bool is_aligned) {
  if (is_aligned) return *reinterpret_cast<const uint4*>(from);
  constexpr int V = Sixteen<T>::COUNT;
  Pack<T, V> all;
#pragma unroll
  for (int i = 0; i < V; i++) all.v[i] = from[i];
  return *reinterpret_cast<const uint4*>(&all);
}

}  // namespace phases
}  // namespace qgraph
