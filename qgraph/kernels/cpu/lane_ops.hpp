// The operations of a chain, over the lanes of one block.
#pragma once

#include "region.h"

namespace qgraph {

constexpr long kBlock = 512;  // lanes of a register: a few registers fit the first cache

// One instruction on registers: float32 for float dtypes, int64 for all others.
struct Lanes {
  void* to;
  const void *a, *b, *c;
  long count;  // registers may be read and written up to the next multiple of 16
  int dtype;   // of the operands
};

using LaneOp = void (*)(const Lanes&);

LaneOp float_op(int op);    // null if there is none
LaneOp integer_op(int op, int dtype);

}  // namespace qgraph
