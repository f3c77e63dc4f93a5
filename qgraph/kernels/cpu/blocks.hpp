// The blocks of elements that a chain of operations works through.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "lane_ops.hpp"
#include "work.hpp"

namespace qgraph {

// Axes that all operands walk through alike are one.
class Shape {
 public:
  Shape(const qg_elementwise& args, std::vector<qg_operand>* operands) {
    for (long i = 0; i < args.rank; i++) {
      if (args.shape[i] == 1) continue;
      if (rank_ && joins(args, i, *operands)) {
        sizes_[rank_ - 1] *= args.shape[i];
      } else {
        sizes_[rank_] = args.shape[i];
        first_[rank_++] = i;
      }
      last_[rank_ - 1] = i;
    }
    for (auto& operand : *operands) {
      int64_t kept[QG_RANK] = {};
      for (long i = 0; i < rank_; i++) kept[i] = operand.strides[last_[i]];
      std::memcpy(operand.strides, kept, sizeof(kept));
    }
    for (long i = 0; i < rank_; i++) count_ *= sizes_[i];
    across_ = find_across(*operands);
  }

  long blocks() const {
    return across_ < 0 ? over(count_, kBlock) : count_ / sizes_[across_] / inner() * tiles();
  }

  long count_of(long block) const {
    if (across_ >= 0) return tile(block).tall * tile(block).wide;
    return std::min(count_ - block * kBlock, kBlock);
  }

  // Calls `f(start, count, index)` for the runs of a block along the last axis.
  template <typename F>
  void runs(long block, F f) const {
    if (across_ >= 0) {
      Tile here = tile(block);
      for (long i = 0; i < here.tall; i++, here.index[across_]++)
        f(i * here.wide, here.wide, here.index);
      return;
    }
    long index[QG_RANK] = {}, left = block * kBlock, count = count_of(block);
    for (long i = rank_ - 1; i >= 0; i--) index[i] = left % sizes_[i], left /= sizes_[i];
    for (long at = 0; at < count;) {
      long here = rank_ ? inner() - index[rank_ - 1] : 1;
      if (here > count - at) here = count - at;
      f(at, here, index);
      at += here;
      if (!rank_) break;
      index[rank_ - 1] += here;
      for (long i = rank_ - 1; i > 0 && index[i] == sizes_[i]; i--) index[i] = 0, index[i - 1]++;
    }
  }

  // Does an operand lie across the others, so that its lines of memory are columns of a tile?
  bool crosses(const qg_operand& operand) const {
    return across_ >= 0 && lies_across(operand, across_);
  }

  // Calls `f(start, step, count, index)` for the columns of a tile: `count` elements along the axis
  // that crosses the last one, `step` places apart in the block.
  template <typename F>
  void columns(long block, F f) const {
    Tile here = tile(block);
    for (long i = 0; i < here.wide; i++, here.index[rank_ - 1]++)
      f(i, here.wide, here.tall, here.index);
  }

  long across() const { return across_; }

  // Is the block one run of whole vectors?
  bool is_run(long block) const {
    if (across_ >= 0 || !rank_) return false;
    long count = count_of(block);
    return count % kLanes == 0 && block * kBlock % inner() + count <= inner();
  }

  long rank() const { return rank_; }

 private:
  bool joins(const qg_elementwise& args, long axis, const std::vector<qg_operand>& operands) const {
    for (const auto& operand : operands)
      if (operand.strides[last_[rank_ - 1]] != operand.strides[axis] * args.shape[axis])
        return false;
    return true;
  }

  static constexpr long kSide = 16;  // of a tile
  static_assert(kSide * kSide <= kBlock);

  struct Tile {
    long tall, wide, index[QG_RANK];
  };

  long inner() const { return rank_ ? sizes_[rank_ - 1] : 1; }
  long tiles() const { return over(sizes_[across_], kSide) * over(inner(), kSide); }

  Tile tile(long block) const {
    Tile tile{0, 0, {}};
    long wide = over(inner(), kSide), at = block % tiles(), left = block / tiles();
    for (long i = rank_ - 2; i >= 0; i--)
      if (i != across_) tile.index[i] = left % sizes_[i], left /= sizes_[i];
    long row = at / wide * kSide, column = at % wide * kSide;
    tile.index[across_] = row, tile.index[rank_ - 1] = column;
    tile.tall = std::min(sizes_[across_] - row, kSide), tile.wide = std::min(inner() - column, kSide);
    return tile;
  }

  bool lies_across(const qg_operand& operand, long axis) const {
    return std::abs(operand.strides[rank_ - 1]) >= kSide && std::abs(operand.strides[axis]) == 1;
  }

  // The axis along which an operand lies side by side that does not along the last one.
  long find_across(const std::vector<qg_operand>& operands) const {
    if (!rank_ || inner() < kSide) return -1;
    for (const auto& operand : operands)
      for (long i = 0; i + 1 < rank_; i++)
        if (sizes_[i] >= kSide && lies_across(operand, i)) return i;
    return -1;
  }

  long rank_ = 0, count_ = 1, sizes_[QG_RANK] = {}, first_[QG_RANK] = {}, last_[QG_RANK] = {};
  long across_ = -1;
};

}  // namespace qgraph
