"""`host-blas`: the product in NumPy, whose BLAS uses the widest registers, on every core.

MLX on Linux CPUs multiplies with a reference BLAS (2048×2048 float32 at 128 rows: 300 ms against
5).  `host-blas` decodes the weight in blocks of rows at each call, `dense+host-blas` keeps it dense
within a memory budget.  Both run from the host between two compiled stretches, in float32.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import mlx.core as mx
import numpy as np
from threadpoolctl import ThreadpoolController

from ..base import Packed, Problem
from .dequantized import dense_weight
from .formats import Float32, decode, scale_values
from .on_host import OnHost, Parts, Product

BLOCK_BYTES = 2 << 20
"""Dense bytes decoded at a time: they should stay in a core's cache until multiplied."""

Rows = Callable[[int, int], Float32]
"""Gives rows `start` to `stop` of a weight, dense."""

_one_at_a_time = threading.Lock()


def _forget_lock() -> None:
    """In a child: a thread that held the lock is not there to let it go."""
    global _one_at_a_time
    _one_at_a_time = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)


@cache
def _pool(process: int, cores: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores, thread_name_prefix="qgraph-blas")


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def own_threads(cores: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for blocks of a product, while BLAS itself keeps to one in each.

    BLAS's own threads wait by spinning for some 30 ms after a call, which slows down whatever
    runs next, and calls of it from several threads at once were 50 times slower.
    """
    with _one_at_a_time, _controller().limit(limits=1, user_api="blas"):
        yield _pool(os.getpid(), cores)


def packed_rows(parts: Parts, problem: Problem) -> Rows:
    """Rows of a packed weight, decoded when asked for."""
    w_q = parts[0]
    scales = scale_values(parts[1], problem.mode)
    biases = parts[2].astype(np.float32, copy=False) if len(parts) > 2 else None

    def rows(start: int, stop: int) -> Float32:
        some = None if biases is None else biases[start:stop]
        return decode(w_q[start:stop], scales[start:stop], some, problem.mode, problem.bits)

    return rows


def multiply(x: Float32, rows: Rows, problem: Problem) -> Float32:
    """x (m, k) by a weight given by rows, block by block on every core; (m, n) float32."""
    count, width = (problem.n, problem.k) if problem.transpose else (problem.k, problem.n)
    step = max(8, min(BLOCK_BYTES // (4 * width), -(-count // problem.cores)))
    blocks = [(start, min(start + step, count)) for start in range(0, count, step)]
    y = np.empty((x.shape[0], problem.n), np.float32)

    def columns(bounds: tuple[int, int]) -> None:
        start, stop = bounds
        np.matmul(x, rows(start, stop).T, out=y[:, start:stop])

    def partial_sum(bounds: tuple[int, int]) -> Float32:
        start, stop = bounds
        part: Float32 = x[:, start:stop] @ rows(start, stop)
        return part

    with own_threads(problem.cores) as threads:
        if problem.transpose:
            list(threads.map(columns, blocks))
        else:
            y[...] = 0
            for part in threads.map(partial_sum, blocks):
                y += part
    return y


class HostBlas(OnHost):
    name = "host-blas"

    def contract(self, problem: Problem) -> str:
        return "computed in float32 by NumPy's BLAS, which sums in another order"

    def product(self, parts: Parts, problem: Problem) -> Product:
        rows = self.rows(parts, problem)
        return lambda x: multiply(x, rows, problem)

    def rows(self, parts: Parts, problem: Problem) -> Rows:
        return packed_rows(parts, problem)


class DenseHostBlas(HostBlas):
    name = "dense+host-blas"
    layout = ("dense-f32",)
    mlx_form = "f32+dense"

    def extra_bytes(self, problem: Problem) -> int:
        return 4 * problem.weights

    def pack(self, parts: Sequence[mx.array], problem: Problem) -> Packed:
        w, *scales = parts
        if problem.mode == "affine":  # else MLX rounds the weight to the dtype of the scales
            scales = [part.astype(mx.float32) for part in scales]
        return (dense_weight([w, *scales], problem.replace(dtype=mx.float32)),)

    def rows(self, parts: Parts, problem: Problem) -> Rows:
        (dense,) = parts
        return lambda start, stop: dense[start:stop]
