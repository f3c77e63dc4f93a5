"""Gather, scatter and slices, as MLX's primitives have them, in terms of ops of the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..functions import FUNCTIONS as F
from ..types import TensorType

UPDATES = ("at_maximum", "at_minimum", "at_add", "at_multiply", "at_set")


def _slices(start: Sequence[int], stop: Sequence[int], steps: Sequence[int]) -> tuple[slice, ...]:
    """Python's slices for MLX's, in which a negative step may end before the first element."""
    return tuple(
        slice(b, None if t < 0 and e < 0 else e, None if t == 1 else t)
        for b, e, t in zip(start, stop, steps, strict=True)
    )


def cut(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`Slice`: first and last index and step of each axis."""
    return F["getitem"](i[0], _slices(*a))


def slice_update(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`SliceUpdate`: how to combine, then as `Slice`."""
    kind, start, stop, steps = a
    return F[UPDATES[kind]](i[0], _slices(start, stop, steps), i[1])


def _axes_first(x: Any, axes: Sequence[int]) -> tuple[Any, list[int]]:
    """x with `axes` moved to the front, and the permutation that did it."""
    order = [*axes, *(d for d in range(x.ndim) if d not in axes)]
    return (x if order == list(range(x.ndim)) else F["transpose"](x, tuple(order))), order


def gather(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`Gather`: slices of sizes `a[1]` from where the indices into the axes `a[0]` say."""
    x, *indices = i
    axes, sizes = a
    front, order = _axes_first(x, axes)
    rest = order[len(axes) :]
    kept = tuple(slice(0, sizes[d]) for d in rest)
    if any(sizes[d] != x.shape[d] for d in rest):
        front = F["getitem"](front, (*(slice(None) for _ in axes), *kept))
    picked = F["take"](front, indices[0], 0) if len(axes) == 1 else front[tuple(indices)]
    # The result has the shape of the indices, then one axis of x each, of size 1 where indexed.
    return F["reshape"](_restore(picked, indices[0].ndim, rest), o[0].shape)


def _restore(picked: Any, lead: int, rest: Sequence[int]) -> Any:
    """Put the axes that were not indexed back in their order."""
    order = sorted(range(len(rest)), key=lambda k: rest[k])
    permuted = (*range(lead), *(lead + k for k in order))
    return picked if permuted == tuple(range(picked.ndim)) else F["transpose"](picked, permuted)


def scatter(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`Scatter`: the updates have the shape of what `gather` with these indices gives."""
    kind, axes = a
    x, *indices, updates = i
    front, order = _axes_first(x, axes)
    lead = indices[0].ndim
    rest = order[len(axes) :]
    kept = [updates.shape[lead + d] for d in rest]
    moved = F["transpose"](updates, (*range(lead), *(lead + d for d in order)))
    values = F["reshape"](moved, (*updates.shape[:lead], *kept))
    place = tuple(indices)
    if any(size != x.shape[d] for size, d in zip(kept, rest, strict=True)):
        place = (*indices, *(slice(0, size) for size in kept))
    result = F[UPDATES[kind]](front, place if len(place) > 1 else place[0], values)
    if order == list(range(x.ndim)):
        return result
    back = sorted(range(x.ndim), key=lambda k: order[k])
    return F["transpose"](result, tuple(back))


def scatter_axis(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`ScatterAxis`: put along an axis, or add what falls on one place."""
    kind, axis = a
    x, index, values = i
    if kind == 1:
        return F["put_along_axis"](x, index, values, axis)
    grid = []
    for d, size in enumerate(index.shape):
        shape = [1] * index.ndim
        shape[d] = size
        grid.append(index if d == axis % x.ndim else F["reshape"](F["arange"](size), tuple(shape)))
    return F["at_add"](x, tuple(grid), values)


def masked_scatter(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`MaskedScatter`: in each row, the source's next element wherever the mask is set."""
    x, mask, source = i
    if source.size == 0:
        return x
    rows = (x.shape[0], -1)
    flat, chosen, given = (F["reshape"](t, rows) for t in (x, mask, source))
    following = F["cumsum"](F["astype"](chosen, mx.int32), 1) - 1
    index = F["clip"](following, 0, given.shape[1] - 1)
    picked = F["take_along_axis"](given, index, 1)
    return F["reshape"](F["where"](chosen, picked, flat), o[0].shape)
