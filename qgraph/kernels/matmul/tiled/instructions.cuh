// What `product.cuh` asks of a GPU: 16-bit floats two by two, tensor cores, asynchronous copies.
//
// On sm_90a `wgmma` reads x from shared memory itself; elsewhere `mma.sync` of each warp does the
// same work on the same fragments.  Fragments and swizzles: PTX ISA, wgmma.mma_async, "register
// fragments" and "matrix descriptor".

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace qgraph {
namespace tiled {

template <typename T>
struct Half;

template <>
struct Half<__nv_bfloat16> {
  static constexpr bool bfloat = true;
  static constexpr float unit = 0x1p32f;  // of the sums
  static __device__ __forceinline__ unsigned fma(unsigned a, unsigned b, unsigned c) {
    unsigned d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
};

template <>
struct Half<__half> {
  static constexpr bool bfloat = false;
  static constexpr float unit = 1;
  static __device__ __forceinline__ unsigned fma(unsigned a, unsigned b, unsigned c) {
    unsigned d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
};

constexpr unsigned NEGATIVE_ZERO = 0x80008000;

template <typename T>
__device__ __forceinline__ unsigned times(unsigned a, unsigned b) {
  return Half<T>::fma(a, b, NEGATIVE_ZERO);
}

// The larger of two bfloat16, two by two.
template <typename T>
__device__ __forceinline__ unsigned larger(unsigned a, unsigned b) {
  static_assert(Half<T>::bfloat, "asked of bfloat16 alone");
  unsigned d;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// (word & MASK) | rest, after a shift right by SHIFT, which may be negative.
template <int SHIFT, unsigned MASK>
__device__ __forceinline__ unsigned masked(unsigned word, unsigned rest) {
  unsigned d;
  const unsigned moved = SHIFT >= 0 ? word >> (SHIFT & 31) : word << (-SHIFT & 31);
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(moved), "n"(MASK), "r"(rest));
  return d;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define QGRAPH_D4 "%0,%1,%2,%3"
#define QGRAPH_D8 QGRAPH_D4 ",%4,%5,%6,%7"
#define QGRAPH_D16 QGRAPH_D8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define QGRAPH_D32 \
  QGRAPH_D16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define QGRAPH_D64                                                                \
  QGRAPH_D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"  \
             "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define QGRAPH_F4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define QGRAPH_F8(i) QGRAPH_F4(i), QGRAPH_F4(i + 4)
#define QGRAPH_F16(i) QGRAPH_F8(i), QGRAPH_F8(i + 8)
#define QGRAPH_F32(i) QGRAPH_F16(i), QGRAPH_F16(i + 16)
#define QGRAPH_F64(i) QGRAPH_F32(i), QGRAPH_F32(i + 32)
#define QGRAPH_WGMMA_AS(TYPE, N, D, F, A, DESCRIPTOR)                                           \
  asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0;"                                            \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" D "}, {" A  \
               "}, " DESCRIPTOR ", p, 1, 1, 0;}"                                                \
               : F(0)                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x))
#define QGRAPH_WGMMA(N, D, F, A, DESCRIPTOR)                     \
  if constexpr (Half<T>::bfloat) {                               \
    QGRAPH_WGMMA_AS("bf16", N, D, F, A, DESCRIPTOR);             \
  } else {                                                       \
    QGRAPH_WGMMA_AS("f16", N, D, F, A, DESCRIPTOR);              \
  }

// Adds to c, 64 rows by COLUMNS, the product of a with 16 columns of x at a descriptor; starts it.
template <typename T, int COLUMNS>
__device__ __forceinline__ void multiply(float* c, const unsigned (&a)[4], unsigned long long x) {
  constexpr int N = COLUMNS >= 128  ? 128
                    : COLUMNS >= 64 ? 64
                    : COLUMNS >= 32 ? 32
                    : COLUMNS >= 16 ? 16
                                    : 8;
  if constexpr (N == 128) {
    QGRAPH_WGMMA(128, QGRAPH_D64, QGRAPH_F64, "%64,%65,%66,%67", "%68");
  } else if constexpr (N == 64) {
    QGRAPH_WGMMA(64, QGRAPH_D32, QGRAPH_F32, "%32,%33,%34,%35", "%36");
  } else if constexpr (N == 32) {
    QGRAPH_WGMMA(32, QGRAPH_D16, QGRAPH_F16, "%16,%17,%18,%19", "%20");
  } else if constexpr (N == 16) {
    QGRAPH_WGMMA(16, QGRAPH_D8, QGRAPH_F8, "%8,%9,%10,%11", "%12");
  } else {
    QGRAPH_WGMMA(8, QGRAPH_D4, QGRAPH_F4, "%4,%5,%6,%7", "%8");
  }
  if constexpr (COLUMNS > N) multiply<T, COLUMNS - N>(c + N / 2, a, x + N * 8);
}

// 64 columns of x in rows of 128 bytes, their 16-byte pieces swizzled, as wgmma is told of them.
__device__ __forceinline__ unsigned long long operand(unsigned shared) {
  return (unsigned long long)(shared >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
__device__ __forceinline__ unsigned long long at_columns(unsigned long long x, int step) {
  return x + 2 * step;
}
__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int LEFT>
__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

#else

template <typename T>
__device__ __forceinline__ void mma(float* c, const unsigned (&a)[4], unsigned b0, unsigned b1) {
#define QGRAPH_MMA(TYPE)                                                                 \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "            \
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                   \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (Half<T>::bfloat) {
    QGRAPH_MMA("bf16");
  } else {
    QGRAPH_MMA("f16");
  }
}

struct Operand {
  unsigned shared;
  int step;
};

template <typename T, int COLUMNS>
__device__ __forceinline__ void multiply(float* c, const unsigned (&a)[4], Operand x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < COLUMNS; i += 8) {
    const int row = lane % 8, piece = 2 * x.step + lane / 8 % 2;
    const unsigned at = x.shared + (i + row) * 128 + (piece ^ row) * 16;
    unsigned b0, b1;
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(b0), "=r"(b1) : "r"(at));
    mma<T>(c + i / 2, a, b0, b1);
  }
}

__device__ __forceinline__ Operand operand(unsigned shared) { return {shared, 0}; }
__device__ __forceinline__ Operand at_columns(Operand x, int step) { return {x.shared, step}; }
__device__ __forceinline__ void begin() {}
__device__ __forceinline__ void commit() {}
template <int LEFT>
__device__ __forceinline__ void wait() {}

#endif

// Starts to copy 16 bytes into shared memory; zeros where `inside` is false, unless SURELY.
template <bool SURELY>
__device__ __forceinline__ void copy_16(unsigned to, const void* from, bool inside) {
  if constexpr (SURELY)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
  else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(inside ? 16 : 0));
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all copies of this thread but those of the last LEFT groups, and shows them to `wgmma`.
template <int LEFT>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The same at once, of eight numbers at any address.
template <typename T>
__device__ __forceinline__ void copy_unaligned(unsigned to, const T* from, bool inside) {
  unsigned v[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    v[i] = inside ? bits(from[2 * i]) | bits(from[2 * i + 1]) << 16 : 0;
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]),
               "r"(v[3]) : "memory");
}

}  // namespace tiled
}  // namespace qgraph
