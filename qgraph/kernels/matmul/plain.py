"""`qmm`: MLX's quantized matmul as it is.

What MLX 0.32 runs for it, from the source of its backends:

- CPU: one thread; the weight is decoded again for each row of x.
- CUDA, compute capability 8 and 9, `transpose=True`: below 8 rows `qmv`, which decodes the weight
  for each row; from 8 rows, if K % max(64, group) == 0, `qmm_sm80` (N % 128 == 0, half precision,
  4 or 8 bits) or `qmm_naive`; else `qmv` again.  `transpose=False` is always `qmm_naive`.
  It raises only for weights that are not contiguous, which packed ones are.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..base import HALF, Kernel, Problem, Streams, named_parts
from ..cuda.rates import LAUNCH_US

QMV_ROWS = 8
"""CUDA runs `qmv` below this many rows."""
QMV_START_US = 2.0
QMV_US = 0.58
"""`qmv`, to begin with, then per million weights and row: 2048×2048 in 4.4 µs, 14336×4096 in 34.9,
at three rows in 102 (one H100, mlx 0.32.4, as the next)."""
TILE_US = 0.46
"""`qmm_sm80` per million weights where they are many: 151936×896 in 63 µs, up to 16 rows."""
TILE_STEP_US = {16: 0.0137, 64: 0.023}
"""The same per column, whose tiles go through a block one after the other, by the rows of a tile:
56 µs for 4096 columns, 187 for 14336; at 64 rows 98 and 290."""
TILE_RATE = 0.105
"""The same on many rows, million million operations a millisecond: a seventh of the matmul's."""
NAIVE_SLOWDOWN = 1.2
"""`qmm_naive` over `qmm_sm80`: 1500 rows of W to 1536, 12 to 512 of x, 1.0 to 1.2 (an H200)."""


class Plain(Kernel):
    name = "qmm"
    left_to_mlx = True

    def applies(self, problem: Problem) -> str | None:
        if problem.dtype not in (*HALF, mx.float32):
            return f"MLX has no quantized matmul for {problem.dtype}"
        if problem.transpose and problem.k % problem.group_size:
            return f"K={problem.k} is not a multiple of group_size={problem.group_size}"
        return None

    def modelled(self, problem: Problem) -> float | None:
        if problem.backend != "cuda":
            return None
        millions = problem.weights / 1e6
        runs = cuda_kernel(problem)
        if runs == "qmv":
            return QMV_START_US + QMV_US * millions * problem.m
        step = TILE_STEP_US[16 if problem.m <= 16 else 64]
        few = max(TILE_US * millions, step * problem.k)
        tiles = max(few, problem.flops / (TILE_RATE * 1e9))
        return LAUNCH_US + tiles * (NAIVE_SLOWDOWN if runs == "qmm_naive" else 1.0)

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        return mx.quantized_matmul(
            x, packed[0], **named_parts(packed), transpose=problem.transpose, **problem.settings
        )


def cuda_kernel(problem: Problem) -> str:
    """Which of its kernels MLX 0.32 runs on CUDA for `qmm`: "qmv", "qmm_sm80" or "qmm_naive"."""
    tiled = problem.k % max(64, problem.group_size) == 0
    if not problem.transpose:
        return "qmm_naive"
    if problem.m < QMV_ROWS or not tiled:
        return "qmv"
    if problem.n % 128 == 0 and problem.dtype in HALF and problem.bits in (4, 8):
        return "qmm_sm80"
    return "qmm_naive"
