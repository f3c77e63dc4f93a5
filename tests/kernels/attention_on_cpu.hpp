// What `attention_instructions.cuh` asks of a GPU, by a CPU as the PTX ISA says.

#pragma once

#include "half_on_cpu.hpp"

namespace qgraph {

template <typename A, typename B>
constexpr bool SAME = std::is_same_v<A, B>;

inline unsigned lower(unsigned a, unsigned b) { return __byte_perm(a, b, 0x5410); }
inline unsigned upper(unsigned a, unsigned b) { return __byte_perm(a, b, 0x7632); }

template <typename T>
float number(unsigned word, int half) {
  T v;
  v.bits = word >> 16 * half;
  return float(v);
}

struct Words {
  unsigned w[6];
};
Words shown[4096];

// What the lanes of a warp show one another.
inline const Words* show(const Words& mine) {
  shown[me] = mine;
  meet(warps[me / 32]);
  return shown + me / 32 * 32;
}
inline void seen() { meet(warps[me / 32]); }

template <typename T>
void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
         unsigned b1) {
  const Words* all = show({{a0, a1, a2, a3, b0, b1}});
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const unsigned a = all[row % 8 * 4 + k % 8 / 2].w[row / 8 + k / 8 * 2];
      const unsigned b = all[column * 4 + k % 8 / 2].w[4 + k / 8];
      c[i] += number<T>(a, k % 2) * number<T>(b, k % 2);
    }
  }
  seen();
}

inline unsigned transposed(unsigned word) {
  const Words* all = show({{word}});
  const int lane = threadIdx.x % 32, row = lane / 4;
  unsigned turned = 0;
  for (int i = 0; i < 2; i++) {
    const int column = lane % 4 * 2 + i;  // of what is turned: its row
    turned |= (all[column * 4 + row / 2].w[0] >> 16 * (row % 2) & 0xffff) << 16 * i;
  }
  seen();
  return turned;
}

}  // namespace qgraph
