// y = x W^T for a quantized W laid out in tiles (layout.py), on tensor cores.
//
// The weight is the left operand of the tensor cores, x the right one, so what a block computes is a
// tile of y transposed: 64 rows of W for each of WN warpgroups, by COLUMNS rows of x.  Both come
// through STAGES slots of shared memory, filled by asynchronous copies some turns ahead.  Words of W
// lie as a lane needs them: one read of 16 bytes holds what it multiplies next.
//
// WK warpgroups share the columns of a stage, and where blocks are few several share all columns:
// each leaves its sums in float32, which `add_parts` adds.  How words become floats is told in
// `formats.cuh`, what is asked of the GPU in `instructions.cuh`.

namespace qgraph {
namespace tiled {

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
// DEPTH columns.
template <typename T, Mode MODE, int BITS, int GROUP, int WN, int WK, int COLUMNS, int DEPTH,
          int STAGES>
struct Product {
  using Number = T;
  static constexpr int rows_of_x = COLUMNS, tiles_down = WN, depth = DEPTH;
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
  // In two batches of so many times 16 columns: one is decoded while the other is multiplied.  With
  // more, the assembler makes the tensor cores wait.
  static constexpr int BATCH = OWN * 2;
  static_assert(OWN * WK == TILES && OWN <= 2, "a batch is of one tile");
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

  // Copies a stage.  WHOLE if all its columns are there, else zeros stand for the others.  FULL if all
  // rows of x are: those beyond the last give columns that are not written, and are not read.  (If all
  // blocks read the last again in their place, they wait for one line of the cache.)
  template <bool WHOLE, bool FULL>
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
      if (!FULL && i / 8 % COLUMNS >= place.rows) continue;
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
      if (!aligned || (stage + 1) * DEPTH > k)
        copy<false, false>(shared, stage, slot);
      else if (COLUMNS > 32 && place.rows >= COLUMNS)
        copy<true, true>(shared, stage, slot);
      else
        copy<true, false>(shared, stage, slot);
    }
    commit_copies();
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
    unsigned left[2][BATCH][4];
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
        auto& mine = left[i + j];
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
      wait_for_copies<STAGES - 3>();
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
      wait_for_copies<0>();
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

// y = x W^T by a Product P, or if PARTS as many parts of it as the grid has layers, in float32, one
// after the other.  N is the number of rows of W where they do not fill their tiles, else 0.
template <typename P, int N, bool PARTS, typename Y>
__device__ void product(const typename P::Number* x, const unsigned* w, const void* scales, Y* y,
                        int m, int k, int n_tiles) {
  extern __shared__ __align__(1024) char stages[];
  const int n = N > 0 ? N : n_tiles * 64, all = (k + P::depth - 1) / P::depth;
  const int each = PARTS ? (all + gridDim.z - 1) / gridDim.z : all, part = PARTS ? blockIdx.z : 0;
  const int row = blockIdx.x * P::rows_of_x, tile = blockIdx.y * P::tiles_down;
  P p{x, reinterpret_cast<const char*>(w), static_cast<const char*>(scales), k, n_tiles - tile,
      Place{row, m - row, size_t(tile)}, {}, reinterpret_cast<size_t>(x) % 16 == 0};
  p.run(stages, part * each, min(all, (part + 1) * each));
  p.join(stages);
  p.template write<N % 2 == 0>(y + size_t(part) * m * n, n);
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
