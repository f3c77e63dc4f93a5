"""Scales and biases for groups: MLX's own, or those searched with weighted error.

The search goes over narrower and narrower ranges.  For each it rounds, then takes the scale and
bias that fit the codes best by least squares (as llama.cpp's `make_qkx2_quants` does), and keeps
what has the smallest weighted error.  MLX's own grid comes first, so nothing is ever worse.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .formats import Array, Format, Grid, decode_scales, e4m3_values, of

_RANGES = {2: (0.45, 14), 3: (0.6, 12), 4: (0.7, 9), 5: (0.85, 5), 6: (0.92, 3), 8: (0.98, 2)}
"""The narrowest range tried for each number of bits, as a share of the whole, and how many."""

_SMALL = 1e-12

_ROWS = 2048
"""Groups that a CPU's cache holds with all that a search makes of them."""


def plain(groups: Array, form: Format, dtype: mx.Dtype) -> Grid:
    """The grid that `mx.quantize` gives each row.

    Args:
        groups: (rows, group size).
        dtype: of affine scales.

    >>> grid = plain(np.arange(32, dtype=np.float32)[None], Format("affine", 5, 32), mx.float32)
    >>> grid.scale.tolist(), grid.bias.tolist()
    ([[-1.0]], [[31.0]])
    """
    lib = of(groups)
    parts = mx.quantize(mx.array(groups).astype(dtype), **form.settings)
    if form.mode == "affine":
        scale, bias = (part.astype(mx.float32) for part in parts[1:])
        if lib is np:
            return Grid(form, _away_from_zero(np.array(scale)), np.array(bias))
        return Grid(form, _away_from_zero(scale), bias)
    scale = decode_scales(parts[1], form.mode)
    scale = np.maximum(scale, _SMALL) if lib is np else mx.maximum(mx.array(scale), _SMALL)
    return Grid(form, scale, scale * 0)


def searched(groups: Array, importance: Array, form: Format, dtype: mx.Dtype) -> Grid:
    """The grid with the smallest weighted error that the search finds for each row.

    Args:
        groups: (rows, group size).
        importance: what an error weighs, (group size) or (rows, group size).
        dtype: of affine scales.
    """
    if of(groups) is mx:
        return _searched(groups, importance, form, dtype)
    pieces = [slice(start, start + _ROWS) for start in range(0, len(groups), _ROWS)]
    spread = np.broadcast_to(importance, groups.shape)
    found = [_searched(groups[piece], spread[piece], form, dtype) for piece in pieces]
    scale, bias = (np.concatenate([grid[i] for grid in found]) for i in (1, 2))
    return Grid(form, scale, bias)


def _searched(groups: Array, importance: Array, form: Format, dtype: mx.Dtype) -> Grid:
    best = plain(groups, form, dtype)
    least = _error(groups, importance, best)
    for grid in _candidates(groups, importance, best, dtype):
        error = _error(groups, importance, grid)
        better = error < least
        lib = of(groups)
        least = lib.where(better, error, least)
        scale = lib.where(better, grid.scale, best.scale)
        best = Grid(form, scale, lib.where(better, grid.bias, best.bias))
        if lib is mx:
            mx.eval(least, best.scale, best.bias)
    return best


def _candidates(groups: Array, importance: Array, first: Grid, dtype: mx.Dtype) -> list[Grid]:
    form, lib = first.format, of(groups)
    if form.mode == "nvfp4":
        values = e4m3_values()
        found = []
        for share in (0.7, 0.8, 0.9, 1.1, 1.2):
            wanted = np.asarray(first.scale) * share
            near = np.abs(values[:, None, None] - wanted).argmin(0) if wanted.size < 64 else (
                np.searchsorted((values[1:] + values[:-1]) / 2, wanted)
            )  # fmt: skip
            scale = np.maximum(values[near], values[1])
            found.append(Grid(form, scale if lib is np else mx.array(scale), first.bias))
        return found
    if form.mode != "affine":
        return [Grid(form, first.scale * share, first.bias) for share in (0.5, 2.0)]
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    least, count = _RANGES[form.bits]
    found = []
    for share in np.linspace(1, least, count).tolist():
        middle, half = (low + high) / 2, (high - low) / 2 * share
        scale = lib.maximum(2 * half / form.levels, _SMALL)
        found.append(_refitted(groups, importance, Grid(form, scale, middle - half), dtype))
    return found


def _refitted(groups: Array, importance: Array, grid: Grid, dtype: mx.Dtype) -> Grid:
    """The scale and bias that fit the codes of `grid` best, by weighted least squares."""
    middle = grid.format.levels / 2
    codes = grid.places(groups) - middle  # about zero, so that little is lost in differences
    total = importance.sum(axis=-1, keepdims=True) + _SMALL
    x, y = (_weighted(each, importance) / total for each in (codes, groups))
    spread = _weighted(codes * codes, importance) - x * x * total
    slope = _weighted(codes * groups, importance) - x * y * total
    scale = of(groups).where(spread > 1e-6 * total, slope / (spread + _SMALL), grid.scale)
    return stored(Grid(grid.format, scale, y - scale * (x + middle)), dtype)


def _weighted(x: Array, importance: Array) -> Array:
    """The sum of each row, (rows, 1)."""
    if of(x) is mx:
        return (x * importance).sum(axis=-1, keepdims=True)
    return np.einsum("ij,ij->i", x, importance)[:, None]


def stored(grid: Grid, dtype: mx.Dtype) -> Grid:
    """The grid with affine scales and biases rounded to the dtype they are stored in."""
    scale, bias = (as_stored(part, dtype) for part in (grid.scale, grid.bias))
    return Grid(grid.format, _away_from_zero(scale), bias)


def as_stored(numbers: Array, dtype: mx.Dtype) -> Array:
    """Numbers in float32, rounded to a dtype.

    >>> as_stored(np.array([1.0001], np.float32), mx.float16).tolist()
    [1.0]
    """
    if dtype == mx.float32:
        return numbers
    if of(numbers) is np and dtype == mx.float16:
        return numbers.astype(np.float16).astype(np.float32)
    rounded = mx.array(numbers).astype(dtype).astype(mx.float32)
    return np.array(rounded) if of(numbers) is np else rounded


def _away_from_zero(scale: Array) -> Array:
    return of(scale).where(abs(scale) < 1e-7, 1e-7, scale)


def _error(groups: Array, importance: Array, grid: Grid) -> Array:
    away = grid.nearest(groups) - groups
    return _weighted(away * away, importance)
