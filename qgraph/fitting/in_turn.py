"""Columns rounded in turn: what one moved by changes what later ones are to be."""

from __future__ import annotations

from .formats import Array, Grid, of


def in_turn(
    grid: Grid, wanted: Array, by: Array, before: Array | None = None
) -> tuple[Array, Array]:
    """Round the columns of a group one after the other.

    Args:
        grid: of the group, one scale and bias a row.
        wanted: what each column is to be, (columns, rows); it is changed.
        by: how far a column moves back for what an earlier one, (later, earlier), moved by.
        before: what columns move from; by default from what is wanted when they are reached.

    Returns:
        The places of the columns, and what was wanted of each when it was reached.
    """
    places = []
    for j in range(len(wanted)):
        places.append(grid.places(wanted[j]))
        if j + 1 < len(wanted):
            moved = grid.at(places[j]) - (wanted if before is None else before)[j]
            wanted[j + 1 :] -= by[j + 1 :, j, None] * moved
    return of(wanted).stack(places), wanted
