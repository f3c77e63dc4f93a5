// y = x W^T for a quantized W laid out in tiles (tile_layout.py), on tensor cores.
//
// The weight is the left operand of the tensor cores, x the right one, so what a block computes is a
// tile of y transposed: 64 rows of W for each of WN warpgroups, by COLUMNS rows of x.  Both come
// through STAGES slots of shared memory, filled by asynchronous copies some turns ahead.  Words of W
// lie as a lane needs them: one read of 16 bytes holds what it multiplies next.
//
// Bits of W become 16-bit floats without conversions, and one fused multiply-add by scale and bias
// rounds them once.  A bfloat16 whose bits are an integer q up to 255 is q 2^-133, below and at the
// smallest exponent alike, so scale times 2^101 makes q scale 2^-32; the sums are multiplied by 2^32
// at the end, and all is exact within 2^+-90.  The exponents of float16 are too few for that: there
// q is set below the bits of 1024, which is then subtracted.  Sums are float32.
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

// Scale, and bias of affine numbers, of two rows, twice in a word each; `higher` is the scale of
// numbers that stand four bits higher.
struct Scale {
  unsigned scale[2], higher[2], bias[2];
};

template <typename T, Mode MODE>
__device__ __forceinline__ Scale read_scale(const char* from, int row) {
  Scale s;
  if constexpr (MODE == AFFINE) {
    const uint2 both = *reinterpret_cast<const uint2*>(from + 4 * row);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      s.scale[r] = __byte_perm(r ? both.y : both.x, 0, 0x1010);
      s.bias[r] = __byte_perm(r ? both.y : both.x, 0, 0x3232);
      if constexpr (Half<T>::bfloat) {
        s.higher[r] = times<T>(s.scale[r], 0x70007000);  // 2^97
        s.scale[r] = times<T>(s.scale[r], 0x72007200);   // 2^101
        s.bias[r] = times<T>(s.bias[r], 0x2f802f80);     // 2^-32
      }
    }
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
      if constexpr (Half<T>::bfloat) value *= MODE == MXFP8 ? 0x1p88f : 0x1p94f;
      s.scale[r] = pair<T>(value, value);
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
  if constexpr (MODE == AFFINE) {
    // Numbers of up to four bits that stand in the upper half of a byte stay there.
    constexpr int LOW = BITS <= 4 && AT % (16 / B::first) * B::first % 8 >= 4 ? 4 : 0;
    unsigned q = field<B::first, AT, LOW>(words, H::bfloat ? 0 : 0x64006400);
    if constexpr (B::second > 0) q = field<B::second, AT, LOW + B::first>(words + B::first, q);
    if constexpr (H::bfloat)
      return H::fma(q, LOW ? s.higher[r] : s.scale[r], s.bias[r]);
    else  // less 1024
      return H::fma(LOW ? H::fma(q, 0x2c002c00, 0xd400d400) : H::fma(q, 0x3c003c00, 0xe400e400),
                    s.scale[r], s.bias[r]);
  } else {
    // e2m1 and e4m3 are the bits of a float with another exponent.
    constexpr int EACH = 16 / BITS, SHIFT = AT % EACH * BITS;
    constexpr int UP = BITS == 4 ? (H::bfloat ? 6 : 9) : (H::bfloat ? 4 : 7);
    constexpr unsigned MASK = ((1u << (BITS - 1)) - 1) << UP;
    const unsigned sign = masked<SHIFT + BITS - 16, 0x80008000>(words[AT / EACH], 0);
    const unsigned v = masked<SHIFT - UP, MASK | MASK << 16>(words[AT / EACH], sign);
    if constexpr (H::bfloat) return times<T>(v, s.scale[r]);
    return times<T>(times<T>(v, BITS == 4 ? 0x74007400 : 0x5c005c00), s.scale[r]);  // 2^14, 2^8
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

// Starts to copy 16 bytes into shared memory; zeros where `inside` is false, unless SURELY.
template <bool SURELY>
__device__ __forceinline__ void copy_16(unsigned to, const void* from, bool inside) {
  if constexpr (SURELY)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
  else
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

// What a block computes: `rows` rows from `row` by the rows of W that begin at `tile` times 64.
struct Place {
  int row, rows;
  size_t tile;
};

// Where rows lie in x and in y, if they are not in order there.
struct Order {
  const unsigned *in_x, *in_y;
};

// WN and WK warpgroups along rows of W and along columns, COLUMNS rows of x, STAGES stages of
// DEPTH columns; BATCH times 16 columns are decoded before they are multiplied.
template <typename T, Mode MODE, int BITS, int GROUP, int WN, int WK, int COLUMNS,
          int DEPTH, int STAGES, int BATCH>
struct Product {
  static constexpr int THREADS = 128 * WN * WK;
  static constexpr int TILES = DEPTH / 64;  // of 64 columns, in a stage
  static constexpr int GROUPS = DEPTH < GROUP ? 1 : DEPTH / GROUP;
  // Bytes of a stage, and the turns in which the threads copy them, 16 bytes each.
  static constexpr int X_BYTES = COLUMNS * DEPTH * 2, X_TURNS = (X_BYTES / 16 - 1) / THREADS + 1;
  static constexpr int W_TILE = 512 * BITS, W_ROW = TILES * W_TILE, W_BYTES = WN * W_ROW;
  static constexpr int W_TURNS = (W_BYTES / 16 - 1) / THREADS + 1;
  static constexpr int S_GROUP = MODE == AFFINE ? 256 : 64, S_ROW = GROUPS * S_GROUP;
  static constexpr int S_BYTES = WN * S_ROW, S_TURNS = (S_BYTES / 16 - 1) / THREADS + 1;
  static constexpr int OWN = TILES / WK;  // tiles of a stage that are a warpgroup's
  static constexpr int BATCHES = OWN * 4 / BATCH;
  static_assert(TILES % WK == 0 && BATCHES == 2, "one batch is decoded while the other is multiplied");
  static_assert(STAGES >= 3, "a stage that is read, one before it, and one under way");
  static_assert(DEPTH % GROUP == 0 || GROUP % DEPTH == 0, "a scale serves a whole stage or less");

  const T* x;
  const char *w, *scales;
  int k, n_tiles;
  Place place;
  Order order;
  bool aligned;

  // Where this thread's copies of the first stage begin, in 16 bytes, turn by turn.
  unsigned x_from[X_TURNS], w_from[W_TURNS], s_from[S_TURNS];
  float c[COLUMNS / 2] = {};

  __device__ __forceinline__ int tiles() const { return (k + 63) / 64; }
  __device__ __forceinline__ int groups() const { return tiles() * 64 / GROUP; }

  __device__ __forceinline__ void prepare() {
    const int last = min(WN, n_tiles) - 1;  // copied again for tiles beyond it
#pragma unroll
    for (int t = 0; t < X_TURNS; t++) {
      const int i = t * THREADS + threadIdx.x, row = min(i / 8 % COLUMNS, place.rows - 1);
      const size_t at = place.row + row;
      x_from[t] = (order.in_x ? order.in_x[at] : at) * (k / 8) + i / 8 / COLUMNS * 8 + i % 8;
    }
#pragma unroll
    for (int t = 0; t < W_TURNS; t++) {
      const int i = t * THREADS + threadIdx.x, row = min(i / (W_ROW / 16), last);
      w_from[t] = (place.tile + row) * tiles() * (W_TILE / 16) + i % (W_ROW / 16);
    }
#pragma unroll
    for (int t = 0; t < S_TURNS; t++) {
      const int i = t * THREADS + threadIdx.x, row = min(i / (S_ROW / 16), last);
      s_from[t] = (place.tile + row) * groups() * (S_GROUP / 16) + i % (S_ROW / 16);
    }
  }

  // Copies a stage; WHOLE if all its columns are there, else zeros stand for the others.
  template <bool WHOLE>
  __device__ __forceinline__ void copy(unsigned shared, int stage, int slot) const {
    const unsigned to = shared + threadIdx.x * 16;
    const int tile = stage * TILES, group = stage * DEPTH / GROUP;
#pragma unroll
    for (int t = 0; t < W_TURNS; t++) {
      const int i = t * THREADS + threadIdx.x;
      if (W_BYTES / 16 % THREADS != 0 && i >= W_BYTES / 16) break;
      const bool inside = WHOLE || tile + i % (W_ROW / 16) / (W_TILE / 16) < tiles();
      const char* from = w + size_t(w_from[t] + tile * (W_TILE / 16)) * 16;
      copy_16<WHOLE>(to + STAGES * X_BYTES + slot * W_BYTES + t * THREADS * 16,
                     inside ? from : w, inside);
    }
#pragma unroll
    for (int t = 0; t < S_TURNS; t++) {
      const int i = t * THREADS + threadIdx.x;
      if (S_BYTES / 16 % THREADS != 0 && i >= S_BYTES / 16) break;
      const bool inside = WHOLE || group + i % (S_ROW / 16) / (S_GROUP / 16) < groups();
      const char* from = scales + size_t(s_from[t] + group * (S_GROUP / 16)) * 16;
      copy_16<WHOLE>(to + STAGES * (X_BYTES + W_BYTES) + slot * S_BYTES + t * THREADS * 16,
                     inside ? from : scales, inside);
    }
    // In rows of 128 bytes whose pieces are swizzled; THREADS / 8 rows are whole swizzles.
    const int piece = threadIdx.x % 8, swizzled = piece ^ threadIdx.x / 8 % 8;
    const unsigned to_x = to + slot * X_BYTES + (swizzled - piece) * 16;
#pragma unroll
    for (int t = 0; t < X_TURNS; t++) {
      const int i = t * THREADS + threadIdx.x;
      if (X_BYTES / 16 % THREADS != 0 && i >= X_BYTES / 16) break;
      const bool inside = WHOLE || stage * DEPTH + i / 8 / COLUMNS * 64 + i % 8 * 8 < k;
      const T* from = inside ? x + size_t(x_from[t] + stage * (DEPTH / 8)) * 8 : x;
      if (WHOLE || aligned)
        copy_16<WHOLE>(to_x + t * THREADS * 16, from, inside);
      else
        copy_unaligned(to_x + t * THREADS * 16, from, inside);
    }
  }

  __device__ __forceinline__ void fetch(unsigned shared, int stage, int slot, int last) const {
    if (stage < last) {
      if (aligned && (stage + 1) * DEPTH <= k)
        copy<true>(shared, stage, slot);
      else
        copy<false>(shared, stage, slot);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  template <int STEP>
  __device__ __forceinline__ void decode_step(unsigned (&a)[4], const unsigned (&words)[BITS],
                                              const char* own_scales, int tile, int row,
                                              Scale& s) const {
    constexpr int EACH = GROUP >= 64 ? 4 : GROUP / 16;  // steps of a group in a tile
    if constexpr (STEP % EACH == 0) {
      const int group = DEPTH < GROUP ? 0 : (tile * 64 + STEP * 16) / GROUP;
      s = read_scale<T, MODE>(own_scales + group * S_GROUP, row);
    }
    decode<T, MODE, BITS, STEP>(a, words, s);
  }

  // A batch of steps of a tile.
  template <int FIRST>
  __device__ __forceinline__ void decode_batch(unsigned (&left)[BATCH][4],
                                               const unsigned (&words)[BITS],
                                               const char* own_scales, int tile, int row,
                                               Scale& s) const {
    decode_step<FIRST>(left[0], words, own_scales, tile, row, s);
    decode_step<FIRST + 1>(left[1], words, own_scales, tile, row, s);
    if constexpr (BATCH == 4) {
      decode_step<FIRST + 2>(left[2], words, own_scales, tile, row, s);
      decode_step<FIRST + 3>(left[3], words, own_scales, tile, row, s);
    }
  }

  // All of a stage that is this warpgroup's; calls `meanwhile` when the first batch is begun.
  template <typename F>
  __device__ __forceinline__ void add(const char* stages, unsigned shared, int slot,
                                      F meanwhile) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // the same in a warp
    const int wn = WK > 1 ? group % WN : group, wk = WK > 1 ? group / WN : 0;
    const int row = warp * 16 + lane / 4 * 2;
    const char* own_w = stages + STAGES * X_BYTES + slot * W_BYTES + wn * W_ROW;
    const char* own_s = stages + STAGES * (X_BYTES + W_BYTES) + slot * S_BYTES + wn * S_ROW;
    unsigned left[BATCHES][BATCH][4];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const int tile = wk * OWN + i;
      const auto right = operand(shared + slot * X_BYTES + tile * COLUMNS * 128);
      unsigned words[BITS];
      read_words<BITS>(words, reinterpret_cast<const unsigned*>(own_w + tile * W_TILE) +
                       warp * 32 * BITS, lane);
      Scale s;
#pragma unroll
      for (int j = 0; j < 4 / BATCH; j++) {
        auto& mine = left[i * 4 / BATCH + j];
        if (j == 0)
          decode_batch<0>(mine, words, own_s, tile, row, s);
        else
          decode_batch<BATCH % 4>(mine, words, own_s, tile, row, s);
        begin();
#pragma unroll
        for (int b = 0; b < BATCH; b++)
          multiply<T, COLUMNS>(c, mine[b], at_columns(right, j * BATCH + b));
        commit();
        wait<1>();  // what was begun before is over, and its registers are free
        if (i == 0 && j == 0) meanwhile();
      }
    }
  }

  // Adds up stages `first` to `last`.
  __device__ __forceinline__ void run(const char* stages, int first, int last) {
    const unsigned shared = __cvta_generic_to_shared(stages);
    if (first >= last) return;
    prepare();
    for (int s = 0; s < STAGES - 2; s++) fetch(shared, first + s, s, last);
    int stage = first, slot = 0, free = STAGES - 2;
    do {
      asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 3) : "memory");
      show_copies();
      __syncthreads();
      // The stage before may still be multiplied; the one before that is free.
      add(stages, shared, slot, [&] { fetch(shared, stage + STAGES - 2, free, last); });
      slot = slot + 1 == STAGES ? 0 : slot + 1;
      free = free + 1 == STAGES ? 0 : free + 1;
    } while (++stage < last);
    wait<0>();
  }

  // Sums of the warpgroups that share columns, in those of the first.
  __device__ __forceinline__ void join(char* stages) {
    if constexpr (WK > 1) {
      asm volatile("cp.async.wait_all;" ::: "memory");
      const int group = threadIdx.x / 128, wn = group % WN, wk = group / WN;
      float* own = reinterpret_cast<float*>(stages) + wn * COLUMNS / 2 * 128 + threadIdx.x % 128;
#pragma unroll
      for (int from = 1; from < WK; from++) {
        __syncthreads();
        if (wk == from) {
#pragma unroll
          for (int i = 0; i < COLUMNS / 2; i++) own[i * 128] = c[i];
        }
        __syncthreads();
        if (wk == 0) {
#pragma unroll
          for (int i = 0; i < COLUMNS / 2; i++) c[i] += own[i * 128];
        }
      }
    }
  }

  // Rows of a tile lie so that a lane holds two neighbours of y, which are one word if ALIGNED.
  template <bool ALIGNED, typename Y>
  __device__ __forceinline__ void write(Y* y, int n) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    const int out = (blockIdx.y * WN + group) * 64 + warp * 16 + lane / 4 * 2;
    if (group >= WN || out >= n) return;
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i += 2) {
      const int row = i / 4 * 8 + lane % 4 * 2 + i / 2 % 2, e = i / 4 * 4 + i / 2 % 2;
      if (row < place.rows) {
        const size_t at = place.row + row;
        Y* to = y + (order.in_y ? order.in_y[at] : at) * n + out;
        const float low = c[e] * Half<T>::unit, high = c[e + 2] * Half<T>::unit;
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
template <typename T, Mode MODE, int BITS, int GROUP, int N, int WN, int WK, int COLUMNS,
          int DEPTH, int STAGES, int BATCH, int PARTS, typename Y>
__device__ void product(const T* x, const unsigned* w, const void* scales, Y* y, int m, int k,
                        int n_tiles) {
  extern __shared__ __align__(1024) char stages[];
  using P = Product<T, MODE, BITS, GROUP, WN, WK, COLUMNS, DEPTH, STAGES, BATCH>;
  const int n = N > 0 ? N : n_tiles * 64, all = (k + DEPTH - 1) / DEPTH;
  const int each = (all + PARTS - 1) / PARTS, part = PARTS > 1 ? blockIdx.z : 0;
  const int row = blockIdx.x * COLUMNS, tile = blockIdx.y * WN;
  P p{x, reinterpret_cast<const char*>(w), static_cast<const char*>(scales), k, n_tiles - tile,
      Place{row, m - row, size_t(tile)}, {}, reinterpret_cast<size_t>(x) % 16 == 0};
  p.run(stages, part * each, min(all, (part + 1) * each));
  p.join(stages);
  p.template write<N % 2 == 0>(y + size_t(part) * m * n, n);
}

// The BLOCK-th portion of up to COLUMNS rows, where those of each expert begin anew; none has 0
// rows.  Rows of expert e are `starts[e]` to `starts[e + 1]`.
template <int COLUMNS>
__device__ __forceinline__ Place portion(int block, const int* starts, int experts, int& expert) {
  const int lane = threadIdx.x % 32;
  for (int from = 0, before = 0; from < experts; from += 32) {
    const int mine = from + lane;
    const int start = starts[min(mine, experts)], rows = starts[min(mine + 1, experts)] - start;
    const int own = (rows + COLUMNS - 1) / COLUMNS;
    int sum = own;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const int other = __shfl_up_sync(0xffffffff, sum, i);
      if (lane >= i) sum += other;
    }
    const int at = block - before - (sum - own);
    const unsigned found = __ballot_sync(0xffffffff, at >= 0 && at < own);
    if (found) {
      const int source = __ffs(found) - 1;
      expert = from + source;
      return {__shfl_sync(0xffffffff, start + at * COLUMNS, source),
              __shfl_sync(0xffffffff, rows - at * COLUMNS, source), 0};
    }
    before += __shfl_sync(0xffffffff, sum, 31);
  }
  return {0, 0, 0};
}

// Rows of y = rows of x by the matrices of their experts; rows are in the order of experts, and
// `order` says where they lie.
template <typename T, Mode MODE, int BITS, int GROUP, int N, int WN, int WK, int COLUMNS,
          int DEPTH, int STAGES, int BATCH>
__device__ void gathered_product(const T* x, const unsigned* w, const void* scales,
                                 const int* starts, Order order, T* y, int k, int n_tiles,
                                 int experts) {
  extern __shared__ __align__(1024) char stages[];
  using P = Product<T, MODE, BITS, GROUP, WN, WK, COLUMNS, DEPTH, STAGES, BATCH>;
  int expert = 0;
  Place place = portion<COLUMNS>(blockIdx.x, starts, experts, expert);
  if (place.rows <= 0) return;
  const int tile = blockIdx.y * WN;
  place.tile = size_t(expert) * n_tiles + tile;
  P p{x, reinterpret_cast<const char*>(w), static_cast<const char*>(scales), k, n_tiles - tile,
      place, order, reinterpret_cast<size_t>(x) % 16 == 0};
  p.run(stages, 0, (k + DEPTH - 1) / DEPTH);
  p.join(stages);
  p.template write<N % 2 == 0>(y, N > 0 ? N : n_tiles * 64);
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
