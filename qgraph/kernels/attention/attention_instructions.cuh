// What `decode_attention.cuh` asks of a GPU: tensor cores on 16-bit floats, and numbers in parts of them.
//
// `mma.m16n8k16` and the fragments of its operands: PTX ISA, "Matrix fragments for mma.m16n8k16".  In
// a fragment, lane 4 g + t of a warp has rows or columns g and g + 8, and of the other axis the pairs
// 2 t and 2 t + 8.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace qgraph {

template <typename A, typename B>
constexpr bool SAME = false;
template <typename A>
constexpr bool SAME<A, A> = true;

// The lower halves of two words, or the upper ones.
__device__ __forceinline__ unsigned lower(unsigned a, unsigned b) {
  return __byte_perm(a, b, 0x5410);
}
__device__ __forceinline__ unsigned upper(unsigned a, unsigned b) {
  return __byte_perm(a, b, 0x7632);
}

// c (16 by 8) += a (16 by 16) b (16 by 8).
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                    unsigned a3, unsigned b0, unsigned b1) {
#define QGRAPH_MMA(TYPE)                                                      \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "          \
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                 \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                        \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if constexpr (SAME<T, __nv_bfloat16>)
    QGRAPH_MMA("bf16");
  else
    QGRAPH_MMA("f16");
#undef QGRAPH_MMA
}

// Of 8 by 8 numbers of 16 bits, two neighbours of a row in each lane: the same of their columns.
__device__ __forceinline__ unsigned transposed(unsigned word) {
  unsigned turned;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(word));
  return turned;
}

}  // namespace qgraph
