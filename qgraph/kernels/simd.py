"""`simd`: on Linux CPUs a kernel of our own, in the widest registers and on every core.

MLX's quantized matmul runs in one thread and decodes the weight once for each row of x.  Here each
element is decoded once, a few rows of the weight at a time, into a buffer that stays in the cache
(`cpu/simd.cpp`).  It runs from the host between two compiled stretches, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from .base import Kernel, Problem, Streams
from .cpu_library import missing, multiply_for
from .host_blas import HostBlas
from .plain import Plain


class Simd(Kernel):
    name = "simd"
    host = True

    def applies(self, problem: Problem) -> str | None:
        if problem.backend != "cpu":
            return "the data is on the GPU"
        if not problem.transpose:
            return "its groups run along the columns of the result"
        return missing() or Plain().applies(problem)

    def contract(self, problem: Problem) -> str:
        return "computed in float32, summed in another order"

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        return self.bind(packed, problem, streams)(x)

    def bind(
        self, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> Callable[[mx.array], mx.array]:
        multiply = multiply_for(problem)
        if multiply is None:
            return HostBlas().bind(packed, problem, streams)
        held = [_raw(part) for part in packed]
        addresses = [part.ctypes.data for part in held] + [None] * (3 - len(held))
        n, k, threads, dtype = problem.n, problem.k, problem.cores, problem.out_dtype

        def call(x: mx.array, held: object = held) -> mx.array:
            if x.dtype != mx.float32:
                x = x.astype(mx.float32)
            mx.eval(x)
            rows = np.ascontiguousarray(x)
            y = np.empty((*rows.shape[:-1], n), np.float32)
            multiply(rows.ctypes.data, *addresses, y.ctypes.data, rows.size // k, n, k, threads)
            result = mx.array(y)
            return result if dtype == mx.float32 else result.astype(dtype)

        return call


def _raw(part: mx.array) -> np.ndarray:
    """The bytes of a packed part; NumPy knows no bfloat16."""
    return np.ascontiguousarray(part.view(mx.uint16) if part.dtype == mx.bfloat16 else part)
