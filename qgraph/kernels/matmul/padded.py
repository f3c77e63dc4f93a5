"""`pad8+…`: zero rows added up to a multiple, so that MLX takes its kernel for matrices.

On CUDA eight rows cost about what one does, and three or four rows run one by one cost more.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..base import EXACT, Kernel, Problem, Streams, Wrapper
from .plain import cuda_kernel


class Padded(Wrapper):
    def __init__(self, rows: int, inner: Kernel) -> None:
        super().__init__(f"pad{rows}", inner)
        self.rows = rows

    def narrowed(self, problem: Problem) -> Problem:
        return problem.replace(m=-(-problem.m // self.rows) * self.rows)

    def applies(self, problem: Problem) -> str | None:
        if problem.m % self.rows == 0:
            return f"M={problem.m} is a multiple of {self.rows} already"
        return super().applies(problem)

    def contract(self, problem: Problem) -> str:
        inner = super().contract(problem)
        if inner != EXACT or problem.backend == "cpu":
            return inner
        same = cuda_kernel(problem) == cuda_kernel(self.narrowed(problem))
        if problem.backend == "cuda" and same:
            return EXACT
        return "sums in float32, where rows one by one may sum in the dtype of x"

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        wide = self.narrowed(problem)
        x = mx.pad(x, [(0, wide.m - problem.m), (0, 0)])
        return self.inner.run(x, packed, wide, streams)[: problem.m]
