"""`simd`: on Linux CPUs a kernel of our own, in the widest registers and on every core.

MLX's quantized matmul runs in one thread and decodes the weight once for each row of x.  Here each
element is decoded once, a few rows of the weight at a time, into a buffer that stays in the cache
(`cpu/simd.cpp`).  It runs from the host between two compiled stretches, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..base import Problem
from ..cpu.library import missing, multiply_for
from .formats import Float32
from .host_blas import HostBlas
from .on_host import OnHost, Parts, Product

SLAB, BLOCK = 512, 256
"""Rows of x that are laid out anew at a time, and what a row may grow by; as in the source."""


class Simd(OnHost):
    name = "simd"

    def applies(self, problem: Problem) -> str | None:
        if not problem.transpose:
            return "its groups run along the columns of the result"
        return super().applies(problem) or missing()

    def contract(self, problem: Problem) -> str:
        return "computed in float32, summed in another order"

    def parts(self, packed: Sequence[mx.array]) -> Parts:
        # NumPy knows no bfloat16, but the bits will do.
        return super().parts([p.view(mx.uint16) if p.dtype == mx.bfloat16 else p for p in packed])

    def product(self, parts: Parts, problem: Problem) -> Product:
        multiply = multiply_for(problem)
        if multiply is None:
            return HostBlas().product(_without_bits(parts, problem), problem)
        addresses = [part.ctypes.data for part in parts] + [None] * (3 - len(parts))
        n, k, threads = problem.n, problem.k, problem.cores

        def product(x: Float32, held: Parts = parts) -> Float32:
            m = x.shape[0]
            y = np.empty((m, n), np.float32)
            room = np.empty(min(m, SLAB) * (k + BLOCK), np.float32)
            multiply(x.ctypes.data, *addresses, y.ctypes.data, room.ctypes.data, m, n, k, threads)
            return y

        return product


def _without_bits(parts: Parts, problem: Problem) -> Parts:
    """The parts with scales that NumPy can compute with."""
    if problem.mode != "affine" or problem.scales_dtype != mx.bfloat16:
        return parts
    w, *scales = parts
    return [w, *((s.astype(np.uint32) << 16).view(np.float32) for s in scales)]
