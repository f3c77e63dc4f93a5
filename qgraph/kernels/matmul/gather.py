"""Ways of carrying out `gather_qmm`: products with matrices picked by index, as of experts.

- `gather_qmm`: MLX's own.  On CUDA it decodes a weight for each row and makes no use of sorted
  indices (MLX issue 4339).
- `sort+gather_qmm`: rows sorted by expert before, put back after; MLX on Metal reads each weight
  once then.
- `dequantize+gather_mm`: all experts dense, rows sorted; for prefill, when most are used anyway.
- `f32+…`: computed in float32, as for plain products on CPUs.
- `group+simd`, `group+host-blas`: on CPUs, one product from the host for each expert that is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import mlx.core as mx
import numpy as np

from ..base import EXACT, HALF, Kernel, Machine, Packed, Problem, Streams, named_parts
from .dequantized import Dequantized
from .float32 import Float32
from .formats import as_numpy
from .host_blas import HostBlas
from .on_host import OnHost, Product, rows_of
from .plain import Plain
from .simd import Simd

ROW_SHARE = 0.65
"""On CUDA a row of `gather_qmm` over a product of one row: experts are read again from the cache.
Eight of 14336×4096: 16 rows in 440 µs, one product of one row in 44."""
DENSE_EXPERTS = 1.75
"""On CUDA `dequantize+gather_mm` over the products by dequantize+matmul one by one: 64 rows of
the same in 2300 µs, eight such products in 1300."""

Indices = mx.array | None


def one_matrix(problem: Problem) -> Problem:
    """All rows by one matrix."""
    return problem.replace(experts=0)


def each_used(problem: Problem) -> tuple[int, Problem]:
    """How many matrices are used, at most, and the product by each if rows go to them evenly."""
    used = max(1, min(problem.experts, problem.m))
    return used, one_matrix(problem).replace(m=-(-problem.m // used))


class Gather(Kernel):
    """Like any kernel, for x (…, m, k), packed parts (experts, n, …) and indices.

    `problem.m` counts all rows of the result: those of x by the number of indices.
    """

    name = "gather_qmm"
    gathers = True
    left_to_mlx = True
    sorts = False

    def applies(self, problem: Problem) -> str | None:
        return None if problem.experts else "the weight is one matrix"

    def estimate(self, problem: Problem, machine: Machine) -> float | None:
        """Microseconds, from what the plain products take that it is made of."""
        one = one_matrix(problem)
        if problem.backend != "cuda":
            return Plain().estimate(one, machine)
        row = Plain().estimate(one.replace(m=1), machine)
        return None if row is None else row * max(1, ROW_SHARE * problem.m)

    def product(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, lhs: Indices, rhs: Indices
    ) -> mx.array:
        """The gathered product; rhs is sorted if `sorts`."""
        return mx.gather_qmm(
            x,
            packed[0],
            **named_parts(packed),
            lhs_indices=lhs,
            rhs_indices=rhs,
            transpose=problem.transpose,
            sorted_indices=self.sorts,
            **problem.settings,
        )

    def run(
        self,
        x: mx.array,
        packed: Sequence[mx.array],
        problem: Problem,
        streams: Streams,
        lhs: Indices = None,
        rhs: Indices = None,
    ) -> mx.array:
        """What `mx.gather_qmm` gives for these operands, in `problem.out_dtype`."""
        if not self.sorts:
            return self.product(x, packed, problem, lhs, rhs)
        lhs, rhs = broadcast_indices(x, problem, lhs, rhs)
        order = mx.argsort(rhs.flatten())
        rows = x.reshape(-1, *x.shape[-2:])[lhs.flatten()[order]]
        y = self.product(rows, packed, problem, None, rhs.flatten()[order])
        back = mx.argsort(order)
        return y[back].reshape(*rhs.shape, x.shape[-2], problem.n)

    def bind(
        self, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> Callable[..., mx.array]:
        """`run` with all but x and the indices given."""

        def call(x: mx.array, lhs_indices: Indices = None, rhs_indices: Indices = None) -> mx.array:
            return self.run(x, packed, problem, streams, lhs_indices, rhs_indices)

        return call


def broadcast_indices(
    x: mx.array, problem: Problem, lhs: Indices, rhs: Indices
) -> tuple[mx.array, mx.array]:
    """Both indices, of one shape; one left out counts up, as in MLX."""
    if lhs is None:
        batch = x.shape[:-2]
        lhs = mx.arange(int(np.prod(batch)), dtype=mx.uint32).reshape(batch)
    if rhs is None:
        rhs = mx.arange(problem.experts, dtype=mx.uint32)
    both = mx.broadcast_arrays(lhs, rhs)
    return both[0], both[1]


class SortedGather(Gather):
    name = "sort+gather_qmm"
    left_to_mlx = False
    sorts = True

    def estimate(self, problem: Problem, machine: Machine) -> float | None:
        return None

    def contract(self, problem: Problem) -> str:
        return EXACT if problem.backend == "cpu" else "MLX may take another kernel for sorted rows"


class DequantizedGather(Gather):
    name = "dequantize+gather_mm"
    left_to_mlx = False
    sorts = True

    def estimate(self, problem: Problem, machine: Machine) -> float | None:
        if problem.backend != "cuda":
            return None
        us = Dequantized().estimate(each_used(problem)[1], machine)
        return None if us is None else us * problem.experts * DENSE_EXPERTS

    def contract(self, problem: Problem) -> str:
        return "the weight is rounded to the dtype of the product, sums run in another order"

    def product(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, lhs: Indices, rhs: Indices
    ) -> mx.array:
        # MLX's gather_mm knows only float32 on CPUs.
        dtype = mx.float32 if problem.backend == "cpu" else problem.out_dtype
        w = mx.dequantize(packed[0], **named_parts(packed), **problem.settings, dtype=dtype)
        if problem.transpose:
            w = w.swapaxes(-1, -2)
        y = mx.gather_mm(x.astype(dtype), w, lhs, rhs, sorted_indices=True)
        return y.astype(problem.out_dtype)


class Float32Gather(Gather):
    name = "f32+gather_qmm"

    def estimate(self, problem: Problem, machine: Machine) -> float | None:
        return Float32(Plain()).estimate(one_matrix(problem), machine)

    def applies(self, problem: Problem) -> str | None:
        if problem.dtype not in HALF:
            return "x is float32 already"
        return super().applies(problem)

    def contract(self, problem: Problem) -> str:
        return "computed in float32, rounded once at the end: closer to exact arithmetic"

    def pack(self, parts: Sequence[mx.array], problem: Problem) -> Packed:
        w, *scales = parts
        return (w, *(s.astype(mx.float32) if problem.mode == "affine" else s for s in scales))

    def product(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, lhs: Indices, rhs: Indices
    ) -> mx.array:
        y = super().product(x.astype(mx.float32), packed, problem, lhs, rhs)
        return y.astype(problem.out_dtype)


class Grouped(Gather):
    """One product from the host for each expert that is used."""

    backends = ("cpu",)
    host = True
    left_to_mlx = False
    mlx_form = Gather.name
    each: OnHost

    def applies(self, problem: Problem) -> str | None:
        return self.each.applies(problem) or super().applies(problem)

    def contract(self, problem: Problem) -> str:
        return self.each.contract(problem)

    def estimate(self, problem: Problem, machine: Machine) -> float | None:
        used, each = each_used(problem)
        us = self.each.estimate(each, machine)
        return None if us is None else us * used

    def run(
        self,
        x: mx.array,
        packed: Sequence[mx.array],
        problem: Problem,
        streams: Streams,
        lhs: Indices = None,
        rhs: Indices = None,
    ) -> mx.array:
        return self.bind(packed, problem, streams)(x, lhs, rhs)

    def bind(
        self, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> Callable[..., mx.array]:
        parts = self.each.parts(packed)

        @cache
        def product_of(expert: int) -> Product:
            return self.each.product([part[expert] for part in parts], problem)

        def call(x: mx.array, lhs_indices: Indices = None, rhs_indices: Indices = None) -> mx.array:
            lhs, rhs = broadcast_indices(x, problem, lhs_indices, rhs_indices)
            mx.eval(x, lhs, rhs)
            left, right = as_numpy(lhs).ravel(), as_numpy(rhs).ravel()
            m = x.shape[-2]
            matrices = rows_of(x, problem.k).reshape(-1, m, problem.k)
            y = np.empty((len(right), m, problem.n), np.float32)
            for expert in np.unique(right):
                users = np.flatnonzero(right == expert)
                together = matrices[left[users]].reshape(-1, problem.k)
                y[users] = product_of(expert)(together).reshape(-1, m, problem.n)
            result = mx.array(y).astype(problem.out_dtype)
            return result.reshape(*rhs.shape, m, problem.n)

        return call


class GroupedSimd(Grouped):
    name = "group+simd"
    each = Simd()


class GroupedHostBlas(Grouped):
    name = "group+host-blas"
    each = HostBlas()
