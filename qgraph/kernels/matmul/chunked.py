"""`chunk4+…`: the rows of x in chunks of at most so many, for a kernel that is best at few rows."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..base import EXACT, NUMBER, Kernel, Problem, Streams, Wrapper
from ..cuda.rates import LAUNCH_US


class Chunked(Wrapper):
    prefix = "chunk" + NUMBER
    backends = ("cuda", "metal")

    @classmethod
    def tried(cls, problem: Problem) -> Sequence[str]:
        return ["chunk4+qmm", "chunk8+qmm"]

    def __init__(self, rows: int, inner: Kernel) -> None:
        super().__init__(f"chunk{rows}", inner)
        self.rows = rows

    def narrowed(self, problem: Problem) -> Problem:
        return problem.replace(m=min(self.rows, problem.m))

    def applies(self, problem: Problem) -> str | None:
        if problem.m <= self.rows:
            return f"M={problem.m} is one chunk of {self.rows}"
        if problem.m > 16 * self.rows:
            return f"M={problem.m} makes more than 16 chunks"
        return super().applies(problem)

    def contract(self, problem: Problem) -> str:
        inner = super().contract(problem)
        if inner != EXACT or problem.backend == "cpu":
            return inner
        return "few rows may sum in the dtype of x, where many sum in float32"

    def modelled(self, problem: Problem) -> float | None:
        inner = self.inner.modelled(self.narrowed(problem))
        return None if inner is None else inner * -(-problem.m // self.rows) + LAUNCH_US

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        parts = [
            self.inner.run(part, packed, problem.replace(m=part.shape[0]), streams)
            for part in mx.split(x, range(self.rows, problem.m, self.rows))
        ]
        return mx.concatenate(parts)
