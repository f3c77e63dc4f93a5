"""`group+tiled`: products by experts as `tiled` does them, all experts in one launch.

Rows are sorted by expert on the GPU, and each is read and written where it lies; few rows, such as
those of one token, have blocks of their own.  The source is `experts.cuh`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import mlx.core as mx

from ...base import Machine, Packed, Problem, Streams
from ...cuda.arch import capability
from ...cuda.rates import bandwidth
from ..gather import Gather, Indices, broadcast_indices, each_used
from .blocks import START_US, Block, block, microseconds, tiles
from .product import CONTRACT, Tiled
from .source import gathered_product, gathered_rows, group_rows, template
from .untiled import LAYOUT, UntiledGather, in_tiles

SORT_US = 4.0
"""Grouping rows by expert."""
FEW = 16
"""Rows up to which none are grouped: the experts of a token all differ, and a launch takes the host
longer than two blocks take to read one weight."""


class TiledGather(Gather):
    """All experts in one launch: rows sorted by expert, each read and written where it lies."""

    name = "group+tiled"
    backends = ("cuda",)
    left_to_mlx = False
    layout = LAYOUT
    mlx_form = UntiledGather.name

    def applies(self, problem: Problem) -> str | None:
        return Tiled().applies(problem) or super().applies(problem)

    def contract(self, problem: Problem) -> str:
        return CONTRACT

    def extra_bytes(self, problem: Problem) -> int:
        return Tiled().extra_bytes(problem)

    def estimate(self, problem: Problem, machine: Machine) -> float | None:
        if (us := machine.measured(self.name, problem)) is not None:
            return us
        if capability(problem.arch) != 90:
            return None
        used, each = each_used(problem)
        b = _gathered_block(problem)
        # As many rows as if the portions of each expert were full.
        rows = used * -(-each.m // b.columns) * b.columns
        steps = microseconds(b, each.replace(m=rows))
        sort = SORT_US if problem.m > FEW else 0.0
        return sort + max(START_US + problem.moved_bytes / bandwidth(problem.arch), steps)

    def pack(self, parts: Sequence[mx.array], problem: Problem) -> Packed:
        return in_tiles(parts, problem)

    def run(
        self,
        x: mx.array,
        packed: Sequence[mx.array],
        problem: Problem,
        streams: Streams,
        lhs: Indices = None,
        rhs: Indices = None,
    ) -> mx.array:
        p, b, each = problem, _gathered_block(problem), x.shape[-2]
        if lhs is None and rhs is not None:
            lhs = _in_turn(tuple(x.shape[:-2]), tuple(rhs.shape))
        lhs, rhs = broadcast_indices(x, problem, lhs, rhs)
        if each == 1 and p.m <= FEW:
            product, portions = gathered_rows(b.shared_memory(p)), p.m
            in_x = _zeros(p.m) if x.size == p.k else lhs.astype(mx.uint32).flatten()
            order = [rhs.astype(mx.uint32).flatten(), in_x]
        else:
            product, portions = gathered_product(b.shared_memory(p)), _portions(p, b)
            order = _grouped_rows(lhs, rhs, each, p.experts)
        y: mx.array = product(
            inputs=[x.reshape(-1, p.k), *packed, *order],
            template=template(p, b),
            grid=(portions * b.threads, -(-tiles(p.n) // b.rows), 1),
            threadgroup=(b.threads, 1, 1),
            output_shapes=[(p.m, p.n)],
            output_dtypes=[p.dtype],
        )[0]
        return y.reshape(*rhs.shape, each, p.n)


def _gathered_block(p: Problem) -> Block:
    """For twice the rows that an expert has on average, as they are not spread evenly."""
    return replace(block(p.replace(m=-(-2 * p.m // p.experts), experts=0)), parts=1)


def _portions(p: Problem, b: Block) -> int:
    """Into how many portions rows fall at most, where those of an expert begin a new one."""
    return -(-p.m // b.columns) + min(p.m, p.experts)


@cache
def _zeros(count: int) -> mx.array:
    """Where rows lie in an x of one row: no launch that spreads the index of it."""
    zeros = mx.zeros((count,), mx.uint32)
    mx.eval(zeros)
    return zeros


@cache
def _in_turn(batch: tuple[int, ...], indices: tuple[int, ...]) -> mx.array:
    """Each matrix of x for its own indices, as without indices of them: no launch either."""
    own = mx.arange(math.prod(batch), dtype=mx.uint32).reshape(batch)
    turns = mx.contiguous(mx.broadcast_to(own, indices))
    mx.eval(turns)
    return turns


def _grouped_rows(lhs: mx.array, rhs: mx.array, each: int, experts: int) -> list[mx.array]:
    """Where rows of each expert begin in the order of experts, and where rows lie in x and in y.

    Args:
        each: rows of a matrix of x.
    """
    rows = rhs.size * each
    made: list[mx.array] = group_rows(4 * (experts + 1))(
        inputs=[lhs.astype(mx.uint32).flatten(), rhs.astype(mx.uint32).flatten()],
        template=[("EACH", each), ("EXPERTS", experts)],
        grid=(1024, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(experts + 1,), (rows,), (rows,)],
        output_dtypes=[mx.int32, mx.uint32, mx.uint32],
    )
    return made
