// What `phases.cuh` asks of a GPU: a barrier over the grid, loads that see what other blocks wrote,
// and tensor cores.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace qgraph {
namespace phases {

// Dynamic shared memory of the block.
__device__ __forceinline__ char* block_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ __forceinline__ unsigned add_released(unsigned* to, unsigned number) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before) : "l"(to), "r"(number) : "memory");
  return before;
}

__device__ __forceinline__ unsigned load_acquired(const unsigned* from) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}

// The same, and between GPUs.
__device__ __forceinline__ unsigned add_released_to_all(unsigned* to, unsigned number) {
  unsigned before;
  asm volatile("atom.add.acq_rel.sys.global.u32 %0, [%1], %2;"
               : "=r"(before) : "l"(to), "r"(number) : "memory");
  return before;
}

__device__ __forceinline__ void store_released_to_all(unsigned* to, unsigned number) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(number) : "memory");
}

__device__ __forceinline__ unsigned load_acquired_of_all(const unsigned* from) {
  unsigned v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}

// 16 bytes of four words each, for themselves: another GPU may see some of them first.
__device__ __forceinline__ void push_16(void* to, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};"
               ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ uint4 look_16(const void* from) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
  return v;
}

__device__ __forceinline__ void give_up() { __trap(); }

// 16, 4 or 2 bytes that any block may have written: of the cache that all share.
__device__ __forceinline__ uint4 load_shared_16(const void* from) {
  return __ldcg(static_cast<const uint4*>(from));
}
template <typename T>
__device__ __forceinline__ T load_shared(const T* from) {
  if constexpr (sizeof(T) == 4) {
    const unsigned v = __ldcg(reinterpret_cast<const unsigned*>(from));
    return *reinterpret_cast<const T*>(&v);
  } else {
    const unsigned short v = __ldcg(reinterpret_cast<const unsigned short*>(from));
    return *reinterpret_cast<const T*>(&v);
  }
}

// A number in shared memory that another warp of the block may have changed.
__device__ __forceinline__ int look_at(const int* number) {
  return *static_cast<const volatile int*>(number);
}

// Copies of 16 bytes into shared memory, which go on while the thread does.
__device__ __forceinline__ void copy_to_block(char* to, const char* from) {
  const unsigned address = __cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

// A barrier in shared memory that the threads of a warp arrive at when all they have begun to copy is
// there (PTX ISA, mbarrier).  Turn after turn ends when all 32 have.
using Landing = unsigned long long;

__device__ __forceinline__ void prepare(Landing* landing) {
  const unsigned address = __cvta_generic_to_shared(landing);
  asm volatile("mbarrier.init.shared.b64 [%0], 32;" ::"r"(address) : "memory");
}
__device__ __forceinline__ void arrive_when_copied(Landing* landing) {
  const unsigned address = __cvta_generic_to_shared(landing);
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address) : "memory");
}
// Is a turn over, of which only this is known: is its number odd?
__device__ __forceinline__ bool is_over(Landing* landing, int odd) {
  const unsigned address = __cvta_generic_to_shared(landing);
  unsigned over;
  asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; "
               "selp.u32 %0, 1, 0, p;}" : "=r"(over) : "r"(address), "r"(odd) : "memory");
  return over;
}

// c += a b of one warp, 16 by 16 and 16 by 8 (PTX ISA, mma.m16n8k16).
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                    unsigned b1) {
#define QGRAPH_PHASES_MMA(TYPE)                                                \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "  \
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"         \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (tiled::Half<T>::bfloat) {
    QGRAPH_PHASES_MMA("bf16");
  } else {
    QGRAPH_PHASES_MMA("f16");
  }
}

}  // namespace phases
}  // namespace qgraph
