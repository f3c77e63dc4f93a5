"""`dense`: the weight dequantized once, at pack time; needs a memory budget."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..base import Kernel, Packed, Problem, Streams
from .dequantized import CONTRACT, dense_product, dense_us, dense_weight
from .float32 import in_half
from .plain import Plain


class Dense(Kernel):
    name = "dense"
    layout = ("dense",)

    @classmethod
    def tried(cls, problem: Problem) -> Sequence[str]:
        slow = problem.backend == "cpu" and in_half(problem)
        return [] if slow else [cls.name]

    def applies(self, problem: Problem) -> str | None:
        return Plain().applies(problem)

    def contract(self, problem: Problem) -> str:
        return CONTRACT

    def extra_bytes(self, problem: Problem) -> int:
        """All of the dense weight: other plans of the program keep the packed one."""
        return problem.weights * problem.out_dtype.size

    def modelled(self, problem: Problem) -> float | None:
        return dense_us(problem)

    def pack(self, parts: Sequence[mx.array], problem: Problem) -> Packed:
        return (dense_weight(parts, problem),)

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        return dense_product(x, packed[0], problem)
