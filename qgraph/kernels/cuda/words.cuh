// Two 16-bit floats in a word.

namespace qgraph {

template <typename T>
__device__ __forceinline__ unsigned bits(T v) {
  return *reinterpret_cast<unsigned short*>(&v);
}

template <typename T>
__device__ __forceinline__ unsigned pair(float low, float high) {
  return bits(T(low)) | bits(T(high)) << 16;
}

}  // namespace qgraph
