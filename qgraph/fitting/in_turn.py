"""Columns rounded in turn: what one moved by changes what later ones are to be."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from .formats import Array, Format, Grid, of


def in_turn(
    grid: Grid, wanted: Array, by: Array, before: Array | None = None
) -> tuple[Array, Array]:
    """Round the columns of a group one after the other.

    Args:
        grid: of the group, one scale and bias a row.
        wanted: what each column is to be, (columns, rows); it may be changed.
        by: how far a column moves back for what an earlier one, (later, earlier), moved by.
        before: what columns move from; by default from what is wanted when they are reached.

    Returns:
        The places of the columns, and what was wanted of each when it was reached.
    """
    if of(wanted) is mx and mx.default_device() != mx.cpu:
        # Steps of one column are small: a GPU waits for the host, unless they are compiled.
        arrays = (grid.scale, grid.bias, wanted, by, *(() if before is None else (before,)))
        places, reached = _compiled(grid.format)(*arrays)
        return places, reached
    return _in_turn(grid, wanted, by, before)


def _in_turn(grid: Grid, wanted: Array, by: Array, before: Array | None) -> tuple[Array, Array]:
    places = []
    for j in range(len(wanted)):
        places.append(grid.places(wanted[j]))
        if j + 1 < len(wanted):
            moved = grid.at(places[j]) - (wanted if before is None else before)[j]
            wanted[j + 1 :] -= by[j + 1 :, j, None] * moved
    return of(wanted).stack(places), wanted


@cache
def _compiled(form: Format) -> Callable[..., Any]:
    def run(
        scale: mx.array, bias: mx.array, wanted: mx.array, by: mx.array, *before: mx.array
    ) -> tuple[mx.array, mx.array]:
        start = before[0] if before else None
        return _in_turn(Grid(form, scale, bias), wanted + 0, by, start)

    return mx.compile(run)
