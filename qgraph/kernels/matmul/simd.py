"""`simd`: on Linux CPUs a kernel of our own, in the widest registers and on every core.

MLX's quantized matmul runs in one thread and decodes the weight once for each row of x.  Here the
codes of a few rows stay in registers, and for many rows blocks of the weight are decoded once into
panels in the cache (`cpu/few_rows.cpp`, `cpu/panels.cpp`).  It runs from the host between two
compiled stretches, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from ..base import Problem
from ..cpu.header import header
from ..cpu.library import library, missing
from ..cpu.region import Step, dtype_number
from .formats import Float32
from .host_blas import HostBlas
from .on_host import OnHost, Parts, Product


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
        if library() is None:
            return HostBlas().product(_without_bits(parts, problem), problem)
        weight = [part.ctypes.data for part in parts]
        sizes = tuple(part.nbytes for part in parts)
        n, threads = problem.n, problem.cores

        def product(x: Float32, held: Parts = parts) -> Float32:
            y = np.empty((x.shape[0], n), np.float32)
            step = _step(problem.replace(m=x.shape[0]), sizes)
            step.run([x.ctypes.data, y.ctypes.data, *weight], threads)
            return y

        return product


@lru_cache(maxsize=256)
def _step(problem: Problem, sizes: tuple[int, ...]) -> Step:
    """The product of contiguous rows; arrays: x, y, and the parts of the weight."""
    h = header()
    m, n, k = problem.m, problem.n, problem.k
    none, scales = h.Ref(-1), dtype_number(problem.scales_dtype)
    biases = h.Ref(4, scales) if problem.mode == "affine" else none
    a = h.Matmul(
        x=h.Ref(0, h.F32), y=h.Ref(1, h.F32), m=m, n=n, k=k, x_row=k, x_column=1, y_row=n,
        y_column=1, alpha=1.0, mode=getattr(h, problem.mode.upper()), bits=problem.bits,
        group=problem.group_size, w=h.Weight(h.Ref(2, h.U32), h.Ref(3, scales), biases),
        w2=h.Weight(none, none, none), bias=none, times=none, add=none, lhs=none, rhs=none,
    )  # fmt: skip
    return Step(h.MATMUL, a, [4 * m * k, 4 * m * n, *sizes])


def _without_bits(parts: Parts, problem: Problem) -> Parts:
    """The parts with scales that NumPy can compute with."""
    if problem.mode != "affine" or problem.scales_dtype != mx.bfloat16:
        return parts
    w, *scales = parts
    return [w, *((s.astype(np.uint32) << 16).view(np.float32) for s in scales)]
