"""`shard2+…`: the rows of the weight split at pack time, one stream (on CPUs: one core) each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import mlx.core as mx

from ..base import NUMBER, Kernel, Machine, Packed, Problem, Streams, Wrapper
from .float32 import IN_MLX, Float32

SYNC_US = 30.0
"""A hand-over between CPU streams, microseconds."""


class Sharded(Wrapper):
    prefix = "shard" + NUMBER
    backends = ("cpu",)

    @classmethod
    def tried(cls, problem: Problem) -> Sequence[str]:
        if problem.cores == 1:
            return []
        return [f"shard{problem.cores}+{name}" for name in Float32.tried(problem) or IN_MLX]

    def __init__(self, shards: int, inner: Kernel) -> None:
        super().__init__(f"shard{shards}", inner, packs=True)
        self.shards = self.streams = shards

    def bounds(self, problem: Problem) -> list[int]:
        """Where shards begin and end, in columns of the result."""
        unit = 8 if problem.transpose else problem.group_size
        units = problem.n // unit
        inner = [unit * (units * i // self.shards) for i in range(1, self.shards)]
        return [0, *inner, problem.n]

    def narrowed(self, problem: Problem) -> Problem:
        return problem.replace(n=self.bounds(problem)[1])

    def applies(self, problem: Problem) -> str | None:
        if problem.cores < self.shards and problem.backend == "cpu":
            return f"{problem.cores} cores are fewer than {self.shards} shards"
        if self.bounds(problem)[1] == 0:
            return f"N={problem.n} is too small for {self.shards} shards"
        return super().applies(problem)

    def extra_bytes(self, problem: Problem) -> int:
        return sum(self.inner.extra_bytes(shard) for shard in self._shards(problem))

    def interpolated(self, problem: Problem, machine: Machine) -> float | None:
        us = super().interpolated(problem, machine)
        if us is not None:
            return us
        whole = self.inner.interpolated(problem, machine)
        return None if whole is None else whole / self.shards + SYNC_US

    def pack(self, parts: Sequence[mx.array], problem: Problem) -> Packed:
        packed: list[mx.array] = []
        bounds = pairwise(self.bounds(problem))
        for (start, stop), shard in zip(bounds, self._shards(problem), strict=True):
            rows = [_columns(part, start, stop, problem) for part in parts]
            packed += self.inner.pack(rows, shard)
        return tuple(packed)

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        each = len(packed) // self.shards
        results = []
        for i, shard in enumerate(self._shards(problem)):
            own = packed[i * each : (i + 1) * each]
            stream = None if self.host else streams.resolve(i)
            if stream is None:
                results.append(self.inner.run(x, own, shard, streams))
            else:
                with mx.stream(stream):
                    results.append(self.inner.run(x, own, shard, streams))
        return mx.concatenate(results, axis=-1)

    def _shards(self, problem: Problem) -> list[Problem]:
        ends = self.bounds(problem)
        return [problem.replace(n=b - a) for a, b in pairwise(ends)]


def _columns(part: mx.array, start: int, stop: int, problem: Problem) -> mx.array:
    """A packed weight's or its scales' share of columns `start` to `stop` of the result."""
    if problem.transpose:
        return mx.contiguous(part[start:stop])
    wide = part.shape[-1]
    return mx.contiguous(part[:, start * wide // problem.n : stop * wide // problem.n])
