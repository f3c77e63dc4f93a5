"""A matrix on the grid of a format, and what that costs the product."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .formats import Array, Format, Grid, of
from .grids import plain, searched


class Rounded:
    """A matrix on its grid.

    Attributes:
        places: as `Grid.places` gives them, (rows, columns).
        scales, biases: (rows, groups).
    """

    def __init__(self, form: Format, places: Array, scales: Array, biases: Array) -> None:
        self.form, self.places, self.scales, self.biases = form, places, scales, biases

    @classmethod
    def joined(cls, form: Format, groups: Sequence[tuple[Array, Grid]]) -> Rounded:
        """Of each group in turn: places, (columns, rows), and a grid with a number for each row."""
        lib = of(groups[0][0])
        places = lib.concatenate([found for found, _ in groups]).T
        scales = lib.stack([grid.scale for _, grid in groups]).T
        biases = lib.stack([grid.bias for _, grid in groups]).T
        return cls(form, places, scales, biases)

    def grid(self, group: int) -> Grid:
        part = slice(group, group + 1)
        return Grid(self.form, self.scales[:, part], self.biases[:, part])

    def values(self) -> Array:
        """The dense weight."""
        rows, columns = self.places.shape
        groups = self.places.reshape(rows, -1, self.form.group_size)
        grid = Grid(self.form, self.scales[..., None], self.biases[..., None])
        return grid.at(groups).reshape(rows, columns)


def nearest(w: Array, form: Format, dtype: mx.Dtype, importance: Array | None = None) -> Rounded:
    """Each number rounded by itself, on MLX's grid or, given what columns weigh, a searched one."""
    rows, columns = w.shape
    size = form.group_size
    groups = w.reshape(-1, size)
    if importance is None:
        grid = plain(groups, form, dtype)
    else:
        spread = of(w).broadcast_to(importance, w.shape).reshape(-1, size)
        grid = searched(groups, spread, form, dtype)
    places = grid.places(groups).reshape(rows, columns)
    return Rounded(form, places, grid.scale.reshape(rows, -1), grid.bias.reshape(rows, -1))


def error(w: Array, h: Array, rounded: Rounded) -> Array:
    """What rounding costs each row: d H dᵀ for the difference d."""
    away = rounded.values() - w
    return ((away @ h) * away).sum(-1)
