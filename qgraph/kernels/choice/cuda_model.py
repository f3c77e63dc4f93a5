"""A rough cost model of MLX 0.32 on Hopper GPUs, for what the measured table does not hold.

The figures were measured on one H200 (mlx 0.32.4) and are in the comments; the rest is the
structure of MLX's kernels (see `plain.py`).  Its estimates rank candidates; they are no promise.
"""

from __future__ import annotations

from ..base import Problem
from ..matmul.plain import cuda_kernel

LAUNCH_US = 2.5
QMV_START_US = 6.0
QMV_US = 0.65
"""`qmv`, to begin with, then per million weights and row: 2048×2048 in 9.5 µs, 14336×4096 in 43.6,
at three rows in 108."""
TILE_US = 0.63
TILE_STEP_US = 0.003
"""`qmm_sm80`, up to 16 rows: per million weights, gate and up of Llama-8B as one in 76 µs, and per
column of a small weight, whose tiles go through them one after the other: 1536×4096 in 14."""
TILE_RATE = 0.24
"""`qmm_sm80` on many rows, million million operations a millisecond: a third of the matmul's."""
MATMUL_RATE = 0.75
"""Dense bf16 of cuBLAS, in the same unit: 8192×8192×8192 at 770 to 790 teraflops."""
MMA_US = 7.0
MMA_BYTES = 1.75e6
"""`mma`: before the first byte, and packed bytes a microsecond up to 8 rows: of 4 bits 2048×2048 in
9 µs, 14336×4096 in 27."""
BANDWIDTH = 4.3e6
"""Bytes a microsecond, read plus written."""
NAIVE_SLOWDOWN = 1.2
"""`qmm_naive` over `qmm_sm80`: 1500 columns against 1536, at 12 to 512 rows 1.0 to 1.2."""


def estimate(name: str, problem: Problem) -> float | None:
    """Microseconds of a kernel, or None for one that the model does not know."""
    first, _, rest = name.partition("+")
    if first.startswith("pad"):
        rows = int(first.removeprefix("pad"))
        inner = estimate(rest, problem.replace(m=-(-problem.m // rows) * rows))
        return None if inner is None else inner + LAUNCH_US
    if first.startswith("chunk"):
        rows = int(first.removeprefix("chunk"))
        inner = estimate(rest, problem.replace(m=min(rows, problem.m)))
        return None if inner is None else inner * -(-problem.m // rows) + LAUNCH_US
    if name == "qmm":
        return _plain(problem)
    if name == "mma":
        tiles = -(-problem.m // 8)
        return MMA_US + problem.packed_bytes / MMA_BYTES * (0.5 + 0.5 * tiles)
    if name == "dense":
        return _matmul(problem)
    if name == "dequantize+matmul":
        written = problem.packed_bytes + problem.weights * problem.out_dtype.size
        return LAUNCH_US + written / BANDWIDTH + _matmul(problem)
    return None


def _plain(problem: Problem) -> float:
    millions = problem.weights / 1e6
    runs = cuda_kernel(problem)
    if runs == "qmv":
        return QMV_START_US + QMV_US * millions * problem.m
    few = max(TILE_US * millions, TILE_STEP_US * problem.k)
    tiles = max(few, problem.flops / (TILE_RATE * 1e9))
    return LAUNCH_US + tiles * (NAIVE_SLOWDOWN if runs == "qmm_naive" else 1.0)


def _matmul(problem: Problem) -> float:
    moved = problem.weights * problem.out_dtype.size
    return LAUNCH_US + max(moved / BANDWIDTH, problem.flops / (MATMUL_RATE * 1e9))
