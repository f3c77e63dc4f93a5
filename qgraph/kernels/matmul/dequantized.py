"""`dequantize+matmul`: the dense weight made at each call; pays from some hundred rows on."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..base import HALF, Kernel, Problem, Streams, named_parts
from ..cuda.arch import capability
from ..cuda.rates import LAUNCH_US, bandwidth, matmul_us
from .plain import Plain

CONTRACT = "the weight is rounded to the dtype of the product, sums run in another order"


def dense_weight(parts: Sequence[mx.array], problem: Problem) -> mx.array:
    """The weight in the dtype of the product, (n, k), or (k, n) with `transpose=False`."""
    return mx.dequantize(
        parts[0], **named_parts(parts), **problem.settings, dtype=problem.out_dtype
    )


def dense_product(x: mx.array, w: mx.array, problem: Problem) -> mx.array:
    return x.astype(problem.out_dtype) @ (w.T if problem.transpose else w)


def dense_us(problem: Problem) -> float | None:
    """Microseconds of the product by a dense weight; None but on CUDA."""
    if problem.backend != "cuda":
        return None
    return matmul_us(problem.weights * problem.out_dtype.size, problem.flops, problem.arch)


class Dequantized(Kernel):
    name = "dequantize+matmul"

    def applies(self, problem: Problem) -> str | None:
        return Plain().applies(problem)

    def contract(self, problem: Problem) -> str:
        return CONTRACT

    def extra_bytes(self, problem: Problem) -> int:
        """On Hopper GPUs the packed weight as it is: all other plans read the one in tiles."""
        tiled = capability(problem.arch) == 90 and problem.dtype in HALF and problem.transpose
        return problem.packed_bytes if tiled else 0

    def modelled(self, problem: Problem) -> float | None:
        if (product := dense_us(problem)) is None:
            return None
        written = problem.packed_bytes + problem.weights * problem.out_dtype.size
        return LAUNCH_US + written / bandwidth(problem.arch) + product

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        return dense_product(x, dense_weight(packed, problem), problem)
