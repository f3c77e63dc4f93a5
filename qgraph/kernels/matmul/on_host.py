"""A base for kernels that run from the host, on NumPy's arrays, between two compiled stretches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..base import HALF, Kernel, Machine, Problem, Streams
from .formats import Float32, as_numpy
from .plain import Plain

Parts = Sequence[npt.NDArray[Any]]
"""Packed parts as a kernel reads them; of experts, the first axis picks one."""

Product = Callable[[Float32], Float32]
"""Of contiguous rows (m, k): (m, n)."""


class OnHost(Kernel):
    """Subclasses give `product`; it is prepared once and computes in float32."""

    backends = ("cpu",)
    host = True
    mlx_form = Plain.name

    def applies(self, problem: Problem) -> str | None:
        if problem.backend != "cpu":
            return "the data is on the GPU"
        return Plain().applies(problem)

    def interpolated(self, problem: Problem, machine: Machine) -> float | None:
        us = super().interpolated(problem, machine)
        if us is None and problem.dtype in HALF:
            us = super().interpolated(problem.in_float32(), machine)
        return us

    def parts(self, packed: Sequence[mx.array]) -> Parts:
        return [np.ascontiguousarray(as_numpy(part)) for part in packed]

    def product(self, parts: Parts, problem: Problem) -> Product:
        """The product by a packed weight, everything but the rows of x prepared."""
        raise NotImplementedError

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        return self.bind(packed, problem, streams)(x)

    def bind(
        self, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> Callable[[mx.array], mx.array]:
        product = self.product(self.parts(packed), problem)
        n, k, dtype = problem.n, problem.k, problem.out_dtype

        def call(x: mx.array) -> mx.array:
            y = product(rows_of(x, k)).reshape(*x.shape[:-1], n)
            return mx.array(y) if dtype == mx.float32 else mx.array(y).astype(dtype)

        return call


def rows_of(x: mx.array, k: int) -> Float32:
    """x (…, k) evaluated, as contiguous rows of float32; a view where it can be."""
    if x.dtype != mx.float32:
        x = x.astype(mx.float32)
    mx.eval(x)
    return np.ascontiguousarray(x).reshape(-1, k)
