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

QMV_ROWS = 8
"""CUDA runs `qmv` below this many rows."""


class Plain(Kernel):
    name = "qmm"

    def applies(self, problem: Problem) -> str | None:
        if problem.dtype not in (*HALF, mx.float32):
            return f"MLX has no quantized matmul for {problem.dtype}"
        if problem.transpose and problem.k % problem.group_size:
            return f"K={problem.k} is not a multiple of group_size={problem.group_size}"
        return None

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
