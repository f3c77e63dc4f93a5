"""Columns rounded in turn: what one moved by changes what later ones are to be."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

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
    on_gpu = of(wanted) is mx and mx.default_device() != mx.cpu
    # A step is small, and a GPU waits for the host: as one kernel.  More is not compiled, as a
    # kernel for each column takes MLX half a minute for each format.
    step = _compiled(grid.format) if on_gpu else partial(_step, grid.format)
    places = []
    for j in range(len(wanted)):
        came = (wanted if before is None else before)[j]
        place, moved = step(grid.scale, grid.bias, wanted[j], came)
        places.append(place)
        if j + 1 < len(wanted):
            wanted[j + 1 :] -= by[j + 1 :, j, None] * moved
    return of(wanted).stack(places), wanted


def _step(
    form: Format, scale: Array, bias: Array, wanted: Array, came: Array
) -> tuple[Array, Array]:
    """The place of a column, and how far it moved."""
    grid = Grid(form, scale, bias)
    place = grid.places(wanted)
    return place, grid.at(place) - came


@cache
def _compiled(form: Format) -> Callable[..., tuple[Array, Array]]:
    return mx.compile(partial(_step, form))
