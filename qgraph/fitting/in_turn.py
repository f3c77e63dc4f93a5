"""Columns rounded in turn: what one moved by changes what later ones are to be."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import mlx.core as mx

from .formats import Array, Format, Grid, of

_BLOCK = 8
"""So many columns take what each other moved by one after the other, later ones in one product."""


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
    # Steps of one column are small: a GPU waits for the host, unless they are compiled.
    block = _compiled(grid.format) if on_gpu else partial(_block, grid.format)
    places = []
    for start in range(0, len(wanted), _BLOCK):
        own, later = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
        came = () if before is None else (before[own],)
        found, wanted[own], moved = block(grid.scale, grid.bias, wanted[own], by[own, own], *came)
        places.append(found)
        if start + _BLOCK < len(wanted):
            wanted[later] -= by[later, own] @ moved
    return of(wanted).concatenate(places), wanted


def _block(
    form: Format, scale: Array, bias: Array, wanted: Array, by: Array, *before: Array
) -> tuple[Array, Array, Array]:
    """Places of a few columns, what was wanted of each when it was reached, how far each moved."""
    grid, lib = Grid(form, scale, bias), of(wanted)
    places: list[Array] = []
    reached: list[Array] = []
    moved: list[Array] = []
    for j in range(len(wanted)):
        reached.append(wanted[j] - sum(by[j, i] * moved[i] for i in range(j)))
        places.append(grid.places(reached[j]))
        came = before[0] if before else reached
        moved.append(grid.at(places[j]) - came[j])
    return lib.stack(places), lib.stack(reached), lib.stack(moved)


@cache
def _compiled(form: Format) -> Callable[..., tuple[Array, Array, Array]]:
    return mx.compile(partial(_block, form))
