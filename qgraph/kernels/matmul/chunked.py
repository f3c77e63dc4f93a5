"""`chunk4+…`: the rows of x in chunks of at most so many, for a kernel that is best at few rows."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..base import EXACT, Kernel, Problem, Streams, Wrapper


class Chunked(Wrapper):
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

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        parts = [
            self.inner.run(part, packed, problem.replace(m=part.shape[0]), streams)
            for part in mx.split(x, range(self.rows, problem.m, self.rows))
        ]
        return mx.concatenate(parts)
