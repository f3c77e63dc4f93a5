"""Groups visited again, from the first on, each set to what is best for it given all others.

A group's scale and bias come first, by least squares under the whole Hessian: two equations. Then
its codes, one column after the other (coordinate descent, as in Behdin et al., "QuantEase",
arXiv:2309.01885). Each step lowers the error of the product, but for what storing a scale rounds:
so a row keeps what a visit gives only if it is better in the end.
"""

from __future__ import annotations

import mlx.core as mx

from .formats import Array, Grid, of, turned
from .grids import stored
from .in_turn import in_turn
from .rounded import Rounded, error

_VISITS = 2
"""Of all groups.  A third lowers the error on other text by less than a hundredth of it."""


def refined(w: Array, h: Array, rounded: Rounded, dtype: mx.Dtype) -> Rounded:
    """The same weight nearer to w under the Hessian.

    Args:
        w: (rows, columns), NumPy's or MLX's.
        h: the damped Hessian of the columns, float32.
        dtype: of affine scales.
    """
    lib = of(w)
    least = error(w, h, rounded)
    for _ in range(_VISITS):
        found = _visited(w, h, rounded, dtype)
        now = error(w, h, found)
        better = now < least
        if not better.any():
            break
        pick = better[:, None]
        rounded = Rounded(
            rounded.form,
            lib.where(pick, found.places, rounded.places),
            lib.where(pick, found.scales, rounded.scales),
            lib.where(pick, found.biases, rounded.biases),
        )
        least = lib.minimum(now, least)
    return rounded


def _visited(w: Array, h: Array, rounded: Rounded, dtype: mx.Dtype) -> Rounded:
    lib, size = of(w), rounded.form.group_size
    values, codes = turned(rounded.values()), turned(rounded.places)
    pull = h @ (turned(w) - values)  # what moving each number would gain
    groups = []
    for start in range(0, w.shape[1], size):
        own, later = slice(start, start + size), slice(start + size, None)
        grid, before, near = rounded.grid(start // size), values[own], h[own, own]
        one = Grid(grid.format, grid.scale[:, 0], grid.bias[:, 0])
        one = _best_scales(one, codes[own], near, pull[own], dtype)
        now, diagonal = one.at(codes[own]), lib.diag(near)[:, None]
        wanted = now + (pull[own] - near @ (now - before)) / diagonal
        found, _ = in_turn(one, wanted, near / diagonal, now)
        if start + size < w.shape[1]:
            pull[later] -= h[later, own] @ (one.at(found) - before)
        groups.append((found, one))
        if lib is mx:
            mx.eval(pull, found, one.scale, one.bias)
    return Rounded.joined(rounded.form, groups)


def _best_scales(grid: Grid, codes: Array, near: Array, pull: Array, dtype: mx.Dtype) -> Grid:
    """The grid whose scale and bias fit the codes of a group best, all other groups as they are.

    Args:
        codes, pull: (columns of the group, rows).
        near: the part of the Hessian that is the group's own.
    """
    if grid.format.mode != "affine":
        return grid
    middle = (grid.format.levels + 1) / 2
    c = codes - middle  # about zero: scale and bias hang together less
    spread = near @ c
    # [cc c1; c1 ones] [scale; bias] = [at_c; at_1], in changes of both; the diagonal a little
    # larger, so that nothing moves far where the codes say nothing
    cc, c1, ones = (c * spread).sum(0), spread.sum(0), near.sum()
    at_c, at_1 = (c * pull).sum(0), pull.sum(0)
    cc, ones = cc * (1 + 1e-4) + 1e-20, ones * (1 + 1e-4) + 1e-20
    parts = cc * ones - c1 * c1
    scale = grid.scale + (at_c * ones - at_1 * c1) / parts
    middles = grid.bias + middle * grid.scale + (at_1 * cc - at_c * c1) / parts
    return stored(Grid(grid.format, scale, middles - middle * scale), dtype)
