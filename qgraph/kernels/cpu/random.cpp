// Random words: Threefry 2x32 with 20 rounds (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers:
// As Easy as 1, 2, 3", 2011), counted as MLX counts.

#include "work.hpp"

namespace qgraph {
namespace {

class Random : public Work {
 public:
  Random(const Table& table, const qg_random& args) : a(args), blocks_(over(args.words, 2)) {
    if (a.count < 0 || a.words < 0 || a.words > INT32_MAX) throw Mistake("%ld words", (long)a.words);
    table.one_of("keys", a.keys, a.keys.dtype == QG_U32, "uint32");
    table.one_of("y", a.y, a.y.dtype == QG_U32, "uint32");
    table.holds("keys", a.keys, 2 * a.count);
    table.holds("y", a.y, a.count * a.words);
  }

  long tasks(int, int threads) const override {
    return a.count && a.words ? over(a.count * up(blocks_, kLanes), part(threads)) : 0;
  }

  void run(const Here& here, int, long task) const override {
    long begin = task * part(here.threads), end = begin + part(here.threads);
    long each = up(blocks_, kLanes), all = a.count * each;
    for (long i = begin; i < end && i < all; i += kLanes)
      draw(here.at<const uint32_t>(a.keys) + i / each * 2,
           here.at<uint32_t>(a.y) + i / each * a.words, i % each);
  }

 private:
  long part(int threads) const {
    return up(part_of(a.count * up(blocks_, kLanes), 8192, threads), kLanes);
  }

  void draw(const uint32_t* key, uint32_t* y, long first) const {
    constexpr int turns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
    constexpr Ints lane = lanes_of([](int i) { return i; });
    uint32_t keys[] = {key[0], key[1], key[0] ^ key[1] ^ 0x1bd11bda};
    Words x = (Words)lane + (uint32_t)first, z = x + (uint32_t)blocks_;
    if (a.words % 2) z = z == (uint32_t)a.words ? Words{} : z;  // the middle one has no other half
    x += keys[0], z += keys[1];
    for (int block = 0; block < 5; block++) {
      for (int turn : turns[block % 2]) {
        x += z;
        z = (z << turn | z >> (32 - turn)) ^ x;
      }
      x += keys[(block + 1) % 3];
      z += keys[(block + 2) % 3] + (uint32_t)(block + 1);
    }
    for (long i = 0; i < kLanes && first + i < blocks_; i++) {
      y[first + i] = x[i];
      if (first + i + blocks_ < a.words) y[first + i + blocks_] = z[i];
    }
  }

  const qg_random a;
  long blocks_;
};

}  // namespace

Maker make_random(const Table& table, long args) {
  return Maker(new Random(table, *table.args<qg_random>(args)));
}

}  // namespace qgraph
