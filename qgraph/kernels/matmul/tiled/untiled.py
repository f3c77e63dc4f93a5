"""`untiled+…`: MLX's own product of a weight that is laid out in tiles, laid back before it.

What MLX's transformations and files take in the place of `tiled`; never the fastest.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ...base import Machine, Packed, Problem, Streams
from ..gather import Gather, Indices
from ..plain import Plain
from .layout import (
    packed_rows,
    rows_of_tiles,
    scales_of,
    scales_of_rows,
    tiled_scales,
    tiled_weight,
)

LAYOUT = ("tiled",)


def in_tiles(parts: Sequence[mx.array], problem: Problem) -> Packed:
    """What kernels of this layout read: the weight and its scales in tiles."""
    w, *scales = parts
    return tiled_weight(w, problem.bits), tiled_scales(scales, problem.group_size)


def in_rows(packed: Sequence[mx.array], problem: Problem) -> Packed:
    """The inverse of `in_tiles`: the weight and its scales as MLX packs them."""
    p, (w, scales) = problem, packed
    rows = packed_rows(w, p.bits, p.n, p.k)
    return (rows, *scales_of(scales, p.scales_dtype, p.n, p.k // p.group_size))


def some_rows(packed: Sequence[mx.array], indices: mx.array, problem: Problem) -> Packed:
    """Rows of the weight and of its scales as MLX packs them; -1 is the last."""
    p, (w, scales) = problem, packed
    rows = indices.astype(mx.int32)
    rows = mx.where(rows < 0, rows + p.n, rows)
    parts = scales_of_rows(scales, p.scales_dtype, rows, p.k // p.group_size)
    return (rows_of_tiles(w, p.bits, rows, p.k), *parts)


class Untiled(Plain):
    name = "untiled+qmm"
    backends = ("cuda",)
    layout = LAYOUT
    left_to_mlx = False
    gives_rows = True

    @classmethod
    def tried(cls, problem: Problem) -> Sequence[str]:
        return []

    def pack(self, parts: Sequence[mx.array], problem: Problem) -> Packed:
        return in_tiles(parts, problem)

    def take_rows(self, packed: Sequence[mx.array], indices: mx.array, problem: Problem) -> Packed:
        return some_rows(packed, indices, problem)

    def run(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, streams: Streams
    ) -> mx.array:
        return super().run(x, in_rows(packed, problem), problem, streams)


class UntiledGather(Gather):
    name = "untiled+gather_qmm"
    backends = ("cuda",)
    layout = LAYOUT
    left_to_mlx = False

    @classmethod
    def tried(cls, problem: Problem) -> Sequence[str]:
        return []

    def estimate(self, problem: Problem, machine: Machine) -> float | None:
        return None

    def pack(self, parts: Sequence[mx.array], problem: Problem) -> Packed:
        return in_tiles(parts, problem)

    def product(
        self, x: mx.array, packed: Sequence[mx.array], problem: Problem, lhs: Indices, rhs: Indices
    ) -> mx.array:
        return super().product(x, in_rows(packed, problem), problem, lhs, rhs)
