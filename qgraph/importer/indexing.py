"""Gather, scatter and slices, as MLX's primitives have them, in terms of ops of the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..tracing.functions import FUNCTIONS as F
from ..types import TensorType

UPDATES = ("at_maximum", "at_minimum", "at_add", "at_multiply", "at_set")


def _slices(start: Sequence[int], steps: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    """Python's slices for so many elements of each axis.

    MLX's own ends are of no use here: a step of 1 stands for any where there is one element.
    """
    found = []
    for first, step, size in zip(start, steps, sizes, strict=True):
        if size == 0:
            found.append(slice(0, 0))
            continue
        end = first + (size - 1) * step + (1 if step > 0 else -1)
        found.append(slice(first, end if end >= 0 else None, None if step == 1 else step))
    return tuple(found)


def cut(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`Slice`: first index, end and step of each axis."""
    start, _, steps = a
    return F["getitem"](i[0], _slices(start, steps, o[0].shape))


def slice_update(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`SliceUpdate`: how to combine, then as `Slice`."""
    kind, start, _, steps = a
    x, update = i
    if update.size == 0:
        return x
    return F[UPDATES[kind]](x, _slices(start, steps, update.shape), update)


def _transposed(x: Any, order: Sequence[int]) -> Any:
    return x if list(order) == list(range(x.ndim)) else F["transpose"](x, tuple(order))


def _axes_first(ndim: int, axes: Sequence[int]) -> list[int]:
    """The permutation that moves `axes` to the front."""
    return [*axes, *(d for d in range(ndim) if d not in axes)]


def _back(order: Sequence[int]) -> list[int]:
    """The permutation that undoes `order`."""
    return sorted(range(len(order)), key=lambda k: order[k])


def _blocks(indices: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
    """Indices of every element of the blocks of these sizes that begin at `indices`.

    The result has the indices' shape, then the sizes.
    """
    found = []
    for k, index in enumerate(indices):
        wide = F["reshape"](index, (*index.shape, *(1 for _ in sizes)))
        if sizes[k] > 1:
            shape = [size if d == k else 1 for d, size in enumerate(sizes)]
            steps = F["reshape"](F["arange"](0, sizes[k], 1, dtype=index.dtype), tuple(shape))
            wide = F["add"](wide, steps)
        found.append(wide)
    return found


def gather(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`Gather`: blocks of the sizes `a[1]`, begun where the indices into the axes `a[0]` say.

    The result has the shape of the indices, then that of a block.
    """
    x, *indices = i
    axes, sizes = a
    order, lead = _axes_first(x.ndim, axes), indices[0].ndim
    rest = order[len(axes) :]
    front = _transposed(x, order)
    if any(sizes[d] != x.shape[d] for d in rest):
        kept = (slice(0, sizes[d]) for d in rest)
        front = F["getitem"](front, (*(slice(None) for _ in axes), *kept))
    if any(sizes[d] > 1 for d in axes):
        picked = front[tuple(_blocks(indices, [sizes[d] for d in axes]))]
        places = [*range(lead), *(lead + k for k in _back(order))]
    else:
        picked = F["take"](front, indices[0], 0) if len(axes) == 1 else front[tuple(indices)]
        places = [*range(lead), *(lead + k for k in _back(_rank(rest)))]
    return F["reshape"](_transposed(picked, places), o[0].shape)


def _rank(numbers: Sequence[int]) -> list[int]:
    return [sorted(numbers).index(n) for n in numbers]


def scatter(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`Scatter`: the updates have the shape of what `gather` with these indices gives."""
    kind, axes = a
    x, *indices, updates = i
    lead, order = indices[0].ndim, _axes_first(x.ndim, axes)
    rest = order[len(axes) :]
    sizes, kept = ([updates.shape[lead + d] for d in some] for some in (axes, rest))
    values = _transposed(updates, [*range(lead), *(lead + d for d in order)])
    if any(size > 1 for size in sizes):
        indices = _blocks(indices, sizes)
    else:
        values = F["reshape"](values, (*updates.shape[:lead], *kept))
    place = tuple(indices)
    if any(size != x.shape[d] for size, d in zip(kept, rest, strict=True)):
        place = (*indices, *(slice(0, size) for size in kept))
    front = _transposed(x, order)
    result = F[UPDATES[kind]](front, place if len(place) > 1 else place[0], values)
    return _transposed(result, _back(order))


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
