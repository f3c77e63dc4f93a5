// Words of a quantized weight in tiles (layout.py) as 16-bit floats, in registers.
//
// Bits become floats without conversions, and one fused multiply-add by scale and bias rounds them
// once.  A bfloat16 whose bits are an integer q up to 255 is q 2^-133, below and at the smallest
// exponent alike, so scale times 2^101 makes q scale 2^-32, and the sums are multiplied by 2^32 at the
// end: exact for scales below 2^26 and sums above 2^-94.  The exponents of float16 are too few for
// that: there q is set below the bits of 1024, which is then subtracted.

namespace qgraph {
namespace tiled {

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

// One of the two numbers of a place of a plane of P bits, of the words of a warp.
template <int P>
__device__ __forceinline__ unsigned number_of(const unsigned* plane, int lane, int place,
                                              int half) {
  if constexpr (P == 0) {
    return 0;
  } else {
    constexpr int EACH = 16 / P, TOGETHER = P < 4 ? P : 4;
    const int word = place / EACH;
    const unsigned v = plane[(word / TOGETHER * 32 + lane) * TOGETHER + word % TOGETHER];
    return v >> (place % EACH * P + 16 * half) & ((1u << P) - 1);
  }
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

// Two scales of e4m3, each in the lower byte of its half of a word; times 2^94 in bfloat16.  Its bits
// are those of a float with another exponent.
template <typename T>
__device__ __forceinline__ unsigned from_e4m3(unsigned two) {
  constexpr int UP = Half<T>::bfloat ? 4 : 7;
  constexpr unsigned BEYOND = 128u << UP;  // the bit that a NaN, all ones, and one more would set
  const unsigned v = (two & 0x007f007f) << UP;
  const unsigned nan = (v + (0x00010001u << UP)) & (BEYOND | BEYOND << 16);
  const unsigned s = (v + nan * (0x8000 / BEYOND - 1)) | (two & 0x00800080) << 8;
  if constexpr (Half<T>::bfloat) return times<T>(times<T>(s, 0x75007500), 0x75007500);  // 2^107
  return times<T>(s, 0x5c005c00);  // 2^8
}

// The same of e8m0, an exponent: 0 is 2^-127, 255 not a number; times 2^94 in bfloat16, or 2^88.
template <typename T, Mode MODE>
__device__ __forceinline__ unsigned from_e8m0(unsigned two) {
  if constexpr (Half<T>::bfloat) {
    const unsigned s = larger<T>(two << 7, 0x00400040);
    return Half<T>::fma(s, MODE == MXFP8 ? 0x6b806b80 : 0x6e806e80, times<T>(s, 0));
  } else {
    float v[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const unsigned byte = two >> 16 * r & 255;
      v[r] = __uint_as_float(byte == 0 ? 1u << 22 : byte == 255 ? 0x7fc00000u : byte << 23);
    }
    return pair<T>(v[0], v[1]);
  }
}

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
    const unsigned bytes = *reinterpret_cast<const unsigned short*>(from + row);
    const unsigned both = MODE == NVFP4 ? from_e4m3<T>(__byte_perm(bytes, 0, 0x4140))
                                        : from_e8m0<T, MODE>(__byte_perm(bytes, 0, 0x4140));
    s.scale[0] = __byte_perm(both, 0, 0x1010);
    s.scale[1] = __byte_perm(both, 0, 0x3232);
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

}  // namespace tiled
}  // namespace qgraph
