"""`dequantize+matmul`: the dense weight made at each call; pays from some hundred rows on."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..base import Kernel, Problem, Streams, named_parts
from .plain import Plain

CONTRACT = "the weight is rounded to the dtype of the product, sums run in another order"


def dense_weight(parts: Sequence[mx.array], problem: Problem) -> mx.array:
    """The weight in the dtype of the product, (n, k), or (k, n) with `transpose=False`."""
    return mx.dequantize(
        parts[0], **named_parts(parts), **problem.settings, dtype=problem.out_dtype
    )


def dense_product(x: mx.array, w: mx.array, problem: Problem) -> mx.array:
    return x.astype(problem.out_dtype) @ (w.T if problem.transpose else w)


class Dequantized(Kernel):
    name = "dequantize+matmul"

    def applies(self, problem: Problem) -> str | None:
        return Plain().applies(problem)

    def contract(self, problem: Problem) -> str:
        return CONTRACT

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        return dense_product(x, dense_weight(packed, problem), problem)
