// y = x W^T for a few rows of x and an affine-quantized W, on tensor cores.
//
// Each warp takes TILES tiles of 16 rows of W and, in turn with the other warps of its block,
// chunks of 128 bytes a row, which it copies into shared memory some turns ahead.  It sums over
// pieces of up to 64 columns that lie in one group.  Quantized numbers become 16-bit floats without
// arithmetic: their bits are set below those of OFFSET (128 in bfloat16, 1024 in float16), so a
// number q reads as OFFSET + q.  With S the sum of x over the piece,
//     sum (scale q + bias) x  =  scale sum (OFFSET + q) x  +  (bias - OFFSET scale) S,
// in float32.  Eight bits are two numbers of four, hi and lo, with q = 16 hi + lo.
//
// In which order the columns of a piece are summed does not matter, so each lane reads neighbours
// and x is brought into the same order.  Layout of the fragments: PTX ISA, mma.m16n8k16.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace qgraph {

#define QGRAPH_MMA(TYPE)                                             \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 " \
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"        \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])               \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))

// The bits of OFFSET and of 1 in each half of a word, OFFSET, and the tensor cores' instruction.
template <typename T>
struct Half;

template <>
struct Half<__nv_bfloat16> {
  static constexpr unsigned magic = 0x43004300, ones = 0x3f803f80;
  static constexpr float offset = 128.0f;
  static __device__ __forceinline__ void
  mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    QGRAPH_MMA("bf16");
  }
};

template <>
struct Half<__half> {
  static constexpr unsigned magic = 0x64006400, ones = 0x3c003c00;
  static constexpr float offset = 1024.0f;
  static __device__ __forceinline__ void
  mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    QGRAPH_MMA("f16");
  }
};

// Starts to copy 16 bytes into shared memory; zeros where `inside` is false.
__device__ __forceinline__ void copy_16(void* to, const void* from, bool inside) {
  const unsigned address = __cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(inside ? 16 : 0));
}

// Every fourth group of four bits of `a`, with `magic` around them, in one instruction.
__device__ __forceinline__ unsigned masked(unsigned a, unsigned magic) {
  unsigned d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "n"(0x000f000f), "r"(magic));
  return d;
}

template <typename T>
__device__ __forceinline__ float number(unsigned bits) {
  unsigned short low = bits;
  return float(*reinterpret_cast<T*>(&low));
}

// The WORDS words of x that begin at `from`, which lies at any address if not ALIGNED.
template <bool ALIGNED, int WORDS, typename T>
__device__ __forceinline__ void load(unsigned (&to)[WORDS], const T* from) {
  if constexpr (ALIGNED) {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(from) + i / 4);
      to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i++) to[i] = bits(from[2 * i]) | bits(from[2 * i + 1]) << 16;
  }
}

// WORDS words of shared memory in one access.
template <int WORDS>
__device__ __forceinline__ void read(unsigned (&to)[WORDS], const char* from) {
  if constexpr (WORDS == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else if constexpr (WORDS == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    to[0] = v.x, to[1] = v.y;
  } else {
    to[0] = *reinterpret_cast<const unsigned*>(from);
  }
}

// STAGES chunks of a warp are under way or read, in WARPS * STAGES * 16 * TILES * STRIDE bytes of
// shared memory, see below.
template <typename T, int BITS, int GROUP, int COLUMNS, int TILES, int WARPS, int STAGES,
          bool ALIGNED>
__device__ void few_rows_at(const T* x, const unsigned* w, const T* scales, const T* biases, T* y,
                            int m, int n, int k) {
  using H = Half<T>;
  constexpr int CHUNK = 1024 / BITS;               // columns in 128 bytes of a row of W
  constexpr int STRIDE = BITS == 4 ? 160 : 192;    // bytes between rows, without bank conflicts
  constexpr int ROWS = 16 * TILES;
  constexpr int PIECE = GROUP < 64 ? GROUP : 64;   // columns summed before a scale is applied
  constexpr int PIECES = CHUNK / PIECE;
  constexpr int MINE = PIECE / 4;                  // columns of a piece that are this lane's
  constexpr int WORDS = MINE * BITS / 32;          // which are so many words of W
  constexpr int XS = MINE / 2;                     // and of x
  constexpr int PARTS = BITS / 4;                  // numbers of four bits that make one of W
  constexpr int GROUPS = CHUNK / GROUP;            // of a chunk; a lane holds those of its quarter
  constexpr int HELD = (GROUPS + 3) / 4;
  constexpr float OFFSET = H::offset * (BITS == 8 ? 17 : 1);

  extern __shared__ __align__(16) char stages[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int first = blockIdx.x * ROWS;
  const int chunks = (k + CHUNK - 1) / CHUNK, groups = k / GROUP, row_bytes = k / 8 * BITS;
  char* mine = stages + warp * STAGES * ROWS * STRIDE;

  auto fetch = [&](int chunk, int stage) {
    if (chunk < chunks) {
#pragma unroll
      for (int i = 0; i < ROWS / 4; i++) {
        const int row = i * 4 + lane / 8, byte = lane % 8 * 16;
        const bool inside = chunk * 128 + byte < row_bytes;
        const char* from = reinterpret_cast<const char*>(w) +
            size_t(min(first + row, n - 1)) * row_bytes + (inside ? chunk * 128 + byte : 0);
        copy_16(mine + (stage * ROWS + row) * STRIDE + byte, from, inside);
      }
    }
    asm volatile("cp.async.commit_group;");
  };
  // Scale and bias of rows g and g + 8, one in each half of a word; zeros beyond the last column.
  auto fetch_scales = [&](int chunk, unsigned (&to)[TILES][2][HELD]) {
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int j = 0; j < HELD; j++) {
          const size_t row = min(first + i * 16 + h * 8 + g, n - 1);
          const int group = chunk * GROUPS + j * 4 + t;
          const size_t at = row * groups + min(group, groups - 1);
          const unsigned both = bits(scales[at]) | bits(biases[at]) << 16;
          to[i][h][j] = group < groups ? both : 0;
        }
  };

  unsigned magic = H::magic;
  asm volatile("" : "+r"(magic));  // a register, not one more constant

  float total[TILES][COLUMNS][4] = {};
  unsigned scale[TILES][2][HELD], following[TILES][2][HELD];
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) fetch(warp + s * WARPS, s);
  fetch_scales(min(warp, chunks - 1), following);

  for (int chunk = warp, turn = 0; chunk < chunks; chunk += WARPS, turn++) {
#pragma unroll
    for (int i = 0; i < TILES * 2 * HELD; i++) (&scale[0][0][0])[i] = (&following[0][0][0])[i];
    fetch(chunk + (STAGES - 1) * WARPS, (turn + STAGES - 1) % STAGES);
    fetch_scales(min(chunk + WARPS, chunks - 1), following);
    // Rows of a tile beyond the last give columns of the result that are not written.
    auto x_at = [&](int p, int c) {
      const size_t row = min(c * 8 + g, m - 1);
      return x + row * k + min(chunk * CHUNK + p * PIECE, k - PIECE) + t * MINE;
    };
    unsigned early[PIECES][XS];  // with one tile of x there is room to load all of it in time
    if constexpr (COLUMNS == 1) {
#pragma unroll
      for (int p = 0; p < PIECES; p++) load<ALIGNED>(early[p], x_at(p, 0));
    }
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1));
    __syncwarp();
    const char* stage = mine + turn % STAGES * ROWS * STRIDE;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      unsigned b[COLUMNS][XS];
      float sum[COLUMNS][4] = {};
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) {
        unsigned v[XS];
        if constexpr (COLUMNS == 1) {
#pragma unroll
          for (int j = 0; j < XS; j++) v[j] = early[p][j];
        } else {
          load<ALIGNED>(v, x_at(p, c));
        }
        // Pairs of columns as they stand in the masked words: (0,4) (1,5) ... or (0,2) (1,3).
        constexpr int FAR = BITS == 4 ? 2 : 1;
#pragma unroll
        for (int j = 0; j < XS; j += 2 * FAR) {
#pragma unroll
          for (int f = 0; f < FAR; f++) {
            b[c][j + 2 * f] = __byte_perm(v[j + f], v[j + f + FAR], 0x5410);
            b[c][j + 2 * f + 1] = __byte_perm(v[j + f], v[j + f + FAR], 0x7632);
          }
        }
#pragma unroll
        for (int j = 0; j < XS; j += 2)
          H::mma(sum[c], H::ones, H::ones, H::ones, H::ones, b[c][j], b[c][j + 1]);
      }
#pragma unroll
      for (int i = 0; i < TILES; i++) {
        unsigned words[2][WORDS];
#pragma unroll
        for (int h = 0; h < 2; h++)
          read(words[h],
               stage + (i * 16 + h * 8 + g) * STRIDE + p * PIECE * BITS / 8 + t * WORDS * 4);
        float acc[COLUMNS][PARTS][4] = {};
#pragma unroll
        for (int j = 0; j < WORDS; j++) {
          unsigned a[2][4];
#pragma unroll
          for (int h = 0; h < 2; h++)
#pragma unroll
            for (int q = 0; q < 4; q++)
              a[h][q] = masked(words[h][j] >> (4 * q), magic);
#pragma unroll
          for (int c = 0; c < COLUMNS; c++) {
            if constexpr (BITS == 4) {
              H::mma(acc[c][0], a[0][0], a[1][0], a[0][1], a[1][1], b[c][4 * j], b[c][4 * j + 1]);
              H::mma(acc[c][0], a[0][2], a[1][2], a[0][3], a[1][3], b[c][4 * j + 2],
                     b[c][4 * j + 3]);
            } else {
              H::mma(acc[c][0], a[0][0], a[1][0], a[0][2], a[1][2], b[c][2 * j], b[c][2 * j + 1]);
              H::mma(acc[c][1], a[0][1], a[1][1], a[0][3], a[1][3], b[c][2 * j], b[c][2 * j + 1]);
            }
          }
        }
        constexpr int LAST = GROUPS - 1;
        const int group = min(p * PIECE / GROUP, LAST);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const unsigned both = __shfl_sync(0xffffffff, scale[i][h][group / 4], group % 4, 4);
          const float s = number<T>(both), o = number<T>(both >> 16) - OFFSET * s;
#pragma unroll
          for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
              float q = acc[c][0][2 * h + e];
              if constexpr (BITS == 8) q += 16.0f * acc[c][1][2 * h + e];
              total[i][c][2 * h + e] += s * q + o * sum[c][e];
            }
          }
        }
      }
    }
    __syncwarp();
  }
  asm volatile("cp.async.wait_all;");
  __syncthreads();

  auto shared = reinterpret_cast<float(*)[TILES][COLUMNS][4][32]>(stages);  // a part for each warp
#pragma unroll
  for (int i = 0; i < TILES; i++)
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
#pragma unroll
      for (int e = 0; e < 4; e++) shared[warp][i][c][e][lane] = total[i][c][e];
  __syncthreads();
  for (int at = threadIdx.x; at < TILES * COLUMNS * 128; at += 32 * WARPS) {
    // Neighbouring threads write neighbouring rows of W, which are columns of y.
    const int low = at % 16, column = at / 16 % 8, c = at / 128 % COLUMNS, i = at / 128 / COLUMNS;
    const int source = low % 8 * 4 + column / 2, e = low / 8 * 2 + column % 2;
    float result = 0;
#pragma unroll
    for (int from = 0; from < WARPS; from++) result += shared[from][i][c][e][source];
    const int row = c * 8 + column, out = first + i * 16 + low;
    if (row < m && out < n) y[size_t(row) * n + out] = T(result);
  }
}

template <typename T, int BITS, int GROUP, int COLUMNS, int TILES, int WARPS, int STAGES>
__device__ void few_rows(const T* x, const unsigned* w, const T* scales, const T* biases, T* y,
                         int m, int n, int k) {
  if (reinterpret_cast<unsigned long long>(x) % 16 == 0)
    few_rows_at<T, BITS, GROUP, COLUMNS, TILES, WARPS, STAGES, true>(x, w, scales, biases, y, m, n,
                                                                     k);
  else
    few_rows_at<T, BITS, GROUP, COLUMNS, TILES, WARPS, STAGES, false>(x, w, scales, biases, y, m, n,
                                                                      k);
}

}  // namespace qgraph
