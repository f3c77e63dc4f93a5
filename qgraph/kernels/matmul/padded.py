"""`pad8+…`: zero rows added up to a multiple, so that MLX takes its kernel for matrices.

On CUDA eight rows cost about what one does, and three or four rows run one by one cost more.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..base import EXACT, NUMBER, Kernel, Problem, Streams, Wrapper
from ..cuda.rates import LAUNCH_US
from .plain import cuda_kernel


class Padded(Wrapper):
    prefix = "pad" + NUMBER
    backends = ("cuda", "metal")

    @classmethod
    def tried(cls, problem: Problem) -> Sequence[str]:
        return ["pad8+qmm", "pad16+qmm"]

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

    def modelled(self, problem: Problem) -> float | None:
        inner = self.inner.modelled(self.narrowed(problem))
        return None if inner is None else inner + LAUNCH_US

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        wide = self.narrowed(problem)
        x = mx.pad(x, [(0, wide.m - problem.m), (0, 0)])
        return self.inner.run(x, packed, wide, streams)[: problem.m]
