// y = x W^T for a quantized W laid out in tiles (tile_layout.py), on tensor cores.
//
// The weight is the left operand of the tensor cores, x the right one, so what a block computes is a
// tile of y transposed: 64 rows of W for each of WN warpgroups, by COLUMNS rows of x.  Both come
// through STAGES slots of shared memory, filled by asynchronous copies some turns ahead.  Words of W
// lie as a lane needs them: one read of 16 bytes holds what it multiplies next.  Their bits become
// 16-bit floats without conversions: set below those of OFFSET (128 in bfloat16, 1024 in float16) a
// number q reads as OFFSET + q; less OFFSET it is exact, and one fused multiply-add by scale and
// bias rounds it once.  Sums are float32.
//
// On sm_90a `wgmma` reads x from shared memory itself; elsewhere `mma.sync` of each warp does the
// same work on the same fragments.  WK warpgroups share the columns of a stage, and with `parts`
// several blocks share all columns: each leaves its sums in float32, which `add_parts` adds.
// Fragments and swizzles: PTX ISA, wgmma.mma_async, "register fragments" and "matrix descriptor".

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace qgraph {
namespace tiled {

// ---- 16-bit floats, two in a word

template <typename T>
struct Half;

template <>
struct Half<__nv_bfloat16> {
  static constexpr bool bfloat = true;
  static constexpr unsigned magic = 0x43004300, less = 0xc300c300, one = 0x3f803f80,
                            sixteen = 0x41804180;
  static __device__ __forceinline__ unsigned fma(unsigned a, unsigned b, unsigned c) {
    unsigned d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
};

template <>
struct Half<__half> {
  static constexpr bool bfloat = false;
  static constexpr unsigned magic = 0x64006400, less = 0xe400e400, one = 0x3c003c00,
                            sixteen = 0x4c004c00;
  static __device__ __forceinline__ unsigned fma(unsigned a, unsigned b, unsigned c) {
    unsigned d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
};

template <typename T>
__device__ __forceinline__ unsigned bits(T v) {
  return *reinterpret_cast<unsigned short*>(&v);
}

template <typename T>
__device__ __forceinline__ unsigned pair(float low, float high) {
  return bits(T(low)) | bits(T(high)) << 16;
}

// (word & MASK) | rest, after a shift right by SHIFT, which may be negative.
template <int SHIFT, unsigned MASK>
__device__ __forceinline__ unsigned masked(unsigned word, unsigned rest) {
  unsigned d;
  const unsigned moved = SHIFT >= 0 ? word >> (SHIFT & 31) : word << (-SHIFT & 31);
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(moved), "n"(MASK), "r"(rest));
  return d;
}

// ---- formats

enum Mode { AFFINE, MXFP4, NVFP4, MXFP8 };

// Numbers of BITS bits are split into planes of 8, 4, 2 and 1 bits, lowest bits first.
template <int BITS>
struct Planes {
  static constexpr int first = BITS == 8 ? 8 : BITS >= 4 ? 4 : 2, second = BITS - first;
};

// The words of a lane for 64 columns, of shared memory where those of its warp begin.
template <int P>
__device__ __forceinline__ void read_plane(unsigned* to, const unsigned* from, int lane) {
  if constexpr (P >= 4) {
#pragma unroll
    for (int i = 0; i < P / 4; i++) {
      const uint4 v = reinterpret_cast<const uint4*>(from)[i * 32 + lane];
      to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
    }
  } else if constexpr (P == 2) {
    const uint2 v = reinterpret_cast<const uint2*>(from)[lane];
    to[0] = v.x, to[1] = v.y;
  } else if constexpr (P == 1) {
    to[0] = from[lane];
  }
}

template <int BITS>
__device__ __forceinline__ void read_words(unsigned (&to)[BITS], const unsigned* from, int lane) {
  using B = Planes<BITS>;
  read_plane<B::first>(to, from, lane);
  read_plane<B::second>(to + B::first, from + 32 * B::first, lane);
}

// The two numbers of place AT (0 to 15) of a plane of P bits, moved to bit LOW of each half.
template <int P, int AT, int LOW>
__device__ __forceinline__ unsigned field(const unsigned* plane, unsigned rest) {
  constexpr int EACH = 16 / P;
  constexpr unsigned MASK = ((1u << P) - 1) << LOW;
  return masked<AT % EACH * P - LOW, MASK | MASK << 16>(plane[AT / EACH], rest);
}

// Scale, and bias of affine numbers, of two rows, twice in a word each.
struct Scale {
  unsigned scale[2], bias[2];
};

template <typename T, Mode MODE>
__device__ __forceinline__ Scale read_scale(const char* from, int row) {
  Scale s;
  if constexpr (MODE == AFFINE) {
    const uint2 both = *reinterpret_cast<const uint2*>(from + 4 * row);
    s.scale[0] = __byte_perm(both.x, 0, 0x1010), s.bias[0] = __byte_perm(both.x, 0, 0x3232);
    s.scale[1] = __byte_perm(both.y, 0, 0x1010), s.bias[1] = __byte_perm(both.y, 0, 0x3232);
  } else {
    const unsigned both = *reinterpret_cast<const unsigned short*>(from + row);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const unsigned byte = r ? both >> 8 : both & 255;
      float value;
      if constexpr (MODE == NVFP4) {  // e4m3, by way of a half with the same bits, 2^8 too small
        const unsigned short half = (byte & 128) << 8 | (byte & 127) << 7;
        value = 256.0f * __half2float(*reinterpret_cast<const __half*>(&half));
      } else {  // e8m0: an exponent; 0 is 2^-127
        value = __uint_as_float(byte == 0 ? 1u << 22 : byte == 255 ? 0x7fc00000u : byte << 23);
      }
      s.scale[r] = s.bias[r] = pair<T>(value, value);
    }
  }
  return s;
}

// Two numbers of a lane: register AT % 4 of the left operand for 16 columns, the AT / 4-th of 64.
template <typename T, Mode MODE, int BITS, int AT>
__device__ __forceinline__ unsigned decoded(const unsigned (&words)[BITS], const Scale& s) {
  using H = Half<T>;
  using B = Planes<BITS>;
  constexpr int r = AT % 2;
  constexpr unsigned NEGATIVE_ZERO = 0x80008000u;
  if constexpr (MODE == AFFINE) {
    unsigned q;
    if constexpr (BITS == 8 && H::bfloat) {  // 8 bits do not fit below those of 128
      const unsigned low = masked<AT % 2 * 8, 0x000f000f>(words[AT / 2], H::magic);
      const unsigned high = masked<AT % 2 * 8 + 4, 0x000f000f>(words[AT / 2], H::magic);
      q = H::fma(H::fma(high, H::one, H::less), H::sixteen, H::fma(low, H::one, H::less));
    } else {
      q = field<B::first, AT, 0>(words, H::magic);
      if constexpr (B::second > 0) q = field<B::second, AT, B::first>(words + B::first, q);
      q = H::fma(q, H::one, H::less);
    }
    return H::fma(q, s.scale[r], s.bias[r]);
  } else if constexpr (BITS == 4) {  // e2m1: the bits of a float with another exponent
    constexpr int UP = H::bfloat ? 6 : 9, SHIFT = AT % 4 * 4;
    const unsigned sign = masked<SHIFT - 12, 0x80008000u>(words[AT / 4], 0);
    constexpr unsigned MASK = 7u << UP;
    const unsigned v = masked<SHIFT - UP, MASK | MASK << 16>(words[AT / 4], sign);
    constexpr unsigned POWER = H::bfloat ? 0x7e807e80u : 0x74007400u;  // 2^126, 2^14
    return H::fma(H::fma(v, POWER, NEGATIVE_ZERO), s.scale[r], NEGATIVE_ZERO);
  } else {  // e4m3
    constexpr int UP = H::bfloat ? 4 : 7, SHIFT = AT % 2 * 8;
    const unsigned sign = masked<SHIFT - 8, 0x80008000u>(words[AT / 2], 0);
    constexpr unsigned MASK = 127u << UP;
    const unsigned v = masked<SHIFT - UP, MASK | MASK << 16>(words[AT / 2], sign);
    constexpr unsigned POWER = H::bfloat ? 0x7b807b80u : 0x5c005c00u;  // 2^120, 2^8
    return H::fma(H::fma(v, POWER, NEGATIVE_ZERO), s.scale[r], NEGATIVE_ZERO);
  }
}

// The left operand for 16 columns, the STEP-th of 64.
template <typename T, Mode MODE, int BITS, int STEP>
__device__ __forceinline__ void decode(unsigned (&a)[4], const unsigned (&words)[BITS],
                                       const Scale& s) {
  a[0] = decoded<T, MODE, BITS, STEP * 4>(words, s);
  a[1] = decoded<T, MODE, BITS, STEP * 4 + 1>(words, s);
  a[2] = decoded<T, MODE, BITS, STEP * 4 + 2>(words, s);
  a[3] = decoded<T, MODE, BITS, STEP * 4 + 3>(words, s);
}

// ---- tensor cores

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
__device__ __forceinline__ void show_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
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
__device__ __forceinline__ void show_copies() {}

#endif

// ---- copies

// Starts to copy 16 bytes into shared memory; zeros where `inside` is false.
__device__ __forceinline__ void copy_16(unsigned to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(inside ? 16 : 0));
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

// ---- the product

// What a block computes: rows `row` to `row + rows` of x, by the matrix at `weight` times 64 rows.
struct Place {
  int row, rows;
  size_t tile;
};

// WN and WK warpgroups along rows of W and along columns, COLUMNS rows of x, STAGES stages of
// DEPTH columns; BATCH times 16 columns are decoded before they are multiplied.
template <typename T, Mode MODE, int BITS, int GROUP, int WN, int WK, int COLUMNS, int DEPTH,
          int STAGES, int BATCH>
struct Product {
  static constexpr int THREADS = 128 * WN * WK;
  static constexpr int TILES = DEPTH / 64;                     // of 64 columns, in a stage
  static constexpr int GROUPS = DEPTH < GROUP ? 1 : DEPTH / GROUP;
  static constexpr int SCALE_BYTES = MODE == AFFINE ? 4 : 1;
  static constexpr int X_BYTES = COLUMNS * DEPTH * 2;
  static constexpr int W_TILE = 512 * BITS, W_BYTES = WN * TILES * W_TILE;
  static constexpr int S_TILE = GROUPS * 64 * SCALE_BYTES, S_BYTES = WN * S_TILE;
  static constexpr int OWN = TILES / WK;                       // tiles of a stage for a warpgroup
  static_assert(TILES % WK == 0 && OWN * 4 / BATCH % 2 == 0, "registers alternate by batches");
  static_assert(STAGES >= 3, "a stage that is read, one before it, and one under way");

  const T* x;
  const char *w, *scales;
  int k, tiles, groups, n_tiles;  // of a row: columns, tiles of 64, groups; tiles of 64 rows
  Place place;
  int first, last;                // stages that this block adds up
  const int* order;               // rows of x, if they are not in order
  bool aligned;

  float c[COLUMNS / 2] = {};

  __device__ __forceinline__ void fetch(unsigned shared, int stage, int slot) const {
    if (stage < last) {
      const int thread = threadIdx.x;
      const unsigned to_x = shared + slot * X_BYTES;
      const unsigned to_w = shared + STAGES * X_BYTES + slot * W_BYTES;
      const unsigned to_s = shared + STAGES * (X_BYTES + W_BYTES) + slot * S_BYTES;
#pragma unroll
      for (int turn = 0; turn < (W_BYTES / 16 + THREADS - 1) / THREADS; turn++) {
        const int i = turn * THREADS + thread;
        if ((W_BYTES / 16) % THREADS != 0 && i >= W_BYTES / 16) break;
        const int part = i / (TILES * W_TILE / 16), piece = i % (TILES * W_TILE / 16);
        const int tile = stage * TILES + piece / (W_TILE / 16);
        const size_t row = place.tile + min(part, n_tiles - 1);
        const bool inside = tile < tiles;
        const char* from = w + (row * tiles + (inside ? stage * TILES : 0)) * W_TILE +
                           (inside ? piece * 16 : 0);
        copy_16(to_w + i * 16, from, inside);
      }
#pragma unroll
      for (int turn = 0; turn < (S_BYTES / 16 + THREADS - 1) / THREADS; turn++) {
        const int i = turn * THREADS + thread;
        if ((S_BYTES / 16) % THREADS != 0 && i >= S_BYTES / 16) break;
        const int part = i / (S_TILE / 16), piece = i % (S_TILE / 16);
        const int group = stage * DEPTH / GROUP, of = piece * 16 / (64 * SCALE_BYTES);
        const size_t row = place.tile + min(part, n_tiles - 1);
        const bool inside = group + of < groups;
        const char* from = scales + (row * groups + (inside ? group : 0)) * 64 * SCALE_BYTES +
                           (inside ? piece * 16 : 0);
        copy_16(to_s + i * 16, from, inside);
      }
#pragma unroll
      for (int turn = 0; turn < (X_BYTES / 16 + THREADS - 1) / THREADS; turn++) {
        const int i = turn * THREADS + thread;
        if ((X_BYTES / 16) % THREADS != 0 && i >= X_BYTES / 16) break;
        const int row = i / 8 % COLUMNS, piece = i % 8, tile = i / 8 / COLUMNS;
        const int column = stage * DEPTH + tile * 64 + piece * 8;
        const bool inside = row < place.rows && column < k;
        const size_t at = inside ? place.row + row : place.row;
        const T* from = x + (order ? order[at] : at) * k + (inside ? column : 0);
        const unsigned to = to_x + (tile * COLUMNS + row) * 128 + (piece ^ row % 8) * 16;
        if (aligned)
          copy_16(to, from, inside);
        else
          copy_unaligned(to, from, inside);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  template <int STEP>
  __device__ __forceinline__ void decode_step(unsigned (&a)[4], const unsigned (&words)[BITS],
                                              const char* own_scales, int tile, int row,
                                              Scale& s) const {
    constexpr int EACH = GROUP >= 64 ? 4 : GROUP / 16;  // steps of a group in a tile
    if constexpr (STEP % EACH == 0) {
      const int group = (tile * 64 + STEP * 16) / GROUP;
      s = read_scale<T, MODE>(own_scales + group * 64 * SCALE_BYTES, row);
    }
    decode<T, MODE, BITS, STEP>(a, words, s);
  }

  // All of a stage that is this warpgroup's.
  __device__ __forceinline__ void add(const char* stages, unsigned shared, int slot) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int group = threadIdx.x / 128, wn = group % WN, wk = group / WN;
    const char* own_w = stages + STAGES * X_BYTES + slot * W_BYTES + wn * TILES * W_TILE;
    const char* own_s = stages + STAGES * (X_BYTES + W_BYTES) + slot * S_BYTES + wn * S_TILE;
    unsigned a[2][BATCH][4];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const int tile = wk * OWN + i;
      unsigned words[BITS];
      read_words<BITS>(words, reinterpret_cast<const unsigned*>(own_w + tile * W_TILE) +
                       warp * 32 * BITS, lane);
      const auto right = operand(shared + slot * X_BYTES + tile * COLUMNS * 128);
      Scale s;
      const int row = warp * 16 + lane / 4 * 2;
#pragma unroll
      for (int j = 0; j < 4 / BATCH; j++) {
        auto& left = a[(i * 4 / BATCH + j) % 2];
        if constexpr (BATCH == 4) {
          decode_step<0>(left[0], words, own_s, tile, row, s);
          decode_step<1>(left[1], words, own_s, tile, row, s);
          decode_step<2>(left[2], words, own_s, tile, row, s);
          decode_step<3>(left[3], words, own_s, tile, row, s);
        } else if constexpr (BATCH == 2) {
          if (j == 0) {
            decode_step<0>(left[0], words, own_s, tile, row, s);
            decode_step<1>(left[1], words, own_s, tile, row, s);
          } else {
            decode_step<2>(left[0], words, own_s, tile, row, s);
            decode_step<3>(left[1], words, own_s, tile, row, s);
          }
        } else {
          if (j == 0) decode_step<0>(left[0], words, own_s, tile, row, s);
          if (j == 1) decode_step<1>(left[0], words, own_s, tile, row, s);
          if (j == 2) decode_step<2>(left[0], words, own_s, tile, row, s);
          if (j == 3) decode_step<3>(left[0], words, own_s, tile, row, s);
        }
        begin();
#pragma unroll
        for (int b = 0; b < BATCH; b++)
          multiply<T, COLUMNS>(c, left[b], at_columns(right, j * BATCH + b));
        commit();
        wait<1>();  // what was begun before is over, and its registers are free
      }
    }
  }

  __device__ __forceinline__ void run(const char* stages) {
    const unsigned shared = __cvta_generic_to_shared(stages);
    for (int s = 0; s < STAGES - 2; s++) fetch(shared, first + s, s);
    if (first >= last) return;
    int stage = first, slot = 0, free = STAGES - 2;
    do {
      asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 3) : "memory");
      show_copies();
      __syncthreads();
      // The stage before may still be multiplied; the one before that is free.
      fetch(shared, stage + STAGES - 2, free);
      add(stages, shared, slot);
      slot = slot + 1 == STAGES ? 0 : slot + 1;
      free = free + 1 == STAGES ? 0 : free + 1;
    } while (++stage < last);
    wait<0>();
  }

  // Sums of the warpgroups that share columns, in those of the first.
  __device__ __forceinline__ void join(char* stages) {
    if constexpr (WK > 1) {
      asm volatile("cp.async.wait_all;" ::: "memory");
      __syncthreads();
      float* shared = reinterpret_cast<float*>(stages);
      const int group = threadIdx.x / 128, wn = group % WN, wk = group / WN;
      const int lane = threadIdx.x % 128;
#pragma unroll
      for (int from = 1; from < WK; from++) {
        if (wk == from) {
#pragma unroll
          for (int i = 0; i < COLUMNS / 2; i++) shared[(wn * COLUMNS / 2 + i) * 128 + lane] = c[i];
        }
        __syncthreads();
        if (wk == 0) {
#pragma unroll
          for (int i = 0; i < COLUMNS / 2; i++) c[i] += shared[(wn * COLUMNS / 2 + i) * 128 + lane];
        }
        __syncthreads();
      }
    }
  }

  // Rows of a tile lie so that a lane holds two neighbours of y, which are one word if ALIGNED.
  template <bool ALIGNED, typename Y>
  __device__ __forceinline__ void write(Y* y, int n, int first_row) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int group = threadIdx.x / 128, wn = group % WN;
    const int out = first_row + wn * 64 + warp * 16 + lane / 4 * 2;
    if (group / WN > 0 || out >= n) return;
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i += 2) {
      const int row = i / 4 * 8 + lane % 4 * 2 + i / 2 % 2;
      if (row < place.rows) {
        const size_t at = place.row + row;
        Y* to = y + (order ? order[at] : at) * n + out;
        const float low = c[i / 4 * 4 + i / 2 % 2], high = c[i / 4 * 4 + i / 2 % 2 + 2];
        if constexpr (!ALIGNED) {
          to[0] = Y(low);
          if (out + 1 < n) to[1] = Y(high);
        } else if constexpr (sizeof(Y) == 4) {
          *reinterpret_cast<float2*>(to) = make_float2(low, high);
        } else {
          *reinterpret_cast<unsigned*>(to) = pair<Y>(low, high);
        }
      }
    }
  }
};

// y = x W^T, or with PARTS > 1 its parts in float32, one after the other.  N is the number of rows
// of W where they do not fill their tiles, else 0.
template <typename T, Mode MODE, int BITS, int GROUP, int N, int WN, int WK, int COLUMNS, int DEPTH,
          int STAGES, int BATCH, int PARTS, typename Y>
__device__ void product(const T* x, const unsigned* w, const void* scales, Y* y, int m, int k,
                        int n_tiles) {
  extern __shared__ __align__(1024) char stages[];
  using P = Product<T, MODE, BITS, GROUP, WN, WK, COLUMNS, DEPTH, STAGES, BATCH>;
  const int n = N > 0 ? N : n_tiles * 64, tiles = (k + 63) / 64;
  const int all = (tiles + P::TILES - 1) / P::TILES;
  const int each = (all + PARTS - 1) / PARTS, part = PARTS > 1 ? blockIdx.z : 0;
  const int row = blockIdx.x * COLUMNS, tile = blockIdx.y * WN;
  P p{x, reinterpret_cast<const char*>(w), static_cast<const char*>(scales), k, tiles,
      tiles * 64 / GROUP, n_tiles - tile, Place{row, m - row, size_t(tile)}, part * each,
      min(all, (part + 1) * each), nullptr, reinterpret_cast<size_t>(x) % 16 == 0};
  p.run(stages);
  p.join(stages);
  p.template write<N % 2 == 0>(y + size_t(part) * m * n, n, tile * 64);
}

// The sum of float32 parts, in T.
template <typename T>
__device__ void add_parts(const float* parts, T* y, int count, size_t size) {
  const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (at >= size) return;
  float sum[4] = {};
  if (size % 4 == 0) {
#pragma unroll 4
    for (int i = 0; i < count; i++) {
      const float4 v = *reinterpret_cast<const float4*>(parts + i * size + at);
      sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
    *reinterpret_cast<uint2*>(y + at) = {pair<T>(sum[0], sum[1]), pair<T>(sum[2], sum[3])};
  } else {
    for (int e = 0; e < 4 && at + e < size; e++) {
      for (int i = 0; i < count; i++) sum[e] += parts[i * size + at + e];
      y[at + e] = T(sum[e]);
    }
  }
}

}  // namespace tiled
}  // namespace qgraph
