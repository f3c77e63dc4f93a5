"""Collectives on arrays, and the part of an array that a rank holds.

Without a group they are called for their types alone, or by one process that is all there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..mesh import launched_backend


def _group(group: Any) -> Any:
    return group if group is not None else mx.distributed.init()


def all_sum(x: mx.array, *, group: Any = None, stream: Any = None) -> mx.array:
    """The sum of all ranks' `x`, on every rank."""
    return mx.distributed.all_sum(x, group=_group(group), stream=stream)


def all_max(x: mx.array, *, group: Any = None, stream: Any = None) -> mx.array:
    """The largest of all ranks' `x`, element by element, on every rank."""
    return mx.distributed.all_max(x, group=_group(group), stream=stream)


def all_min(x: mx.array, *, group: Any = None, stream: Any = None) -> mx.array:
    """The smallest of all ranks' `x`, element by element, on every rank."""
    return mx.distributed.all_min(x, group=_group(group), stream=stream)


def all_gather(
    x: mx.array, ranks: int | None = None, *, group: Any = None, stream: Any = None
) -> mx.array:
    """All ranks' `x` joined along the first axis, on every rank; a number as one of each.

    Args:
        ranks: how many there are; by default those that were launched.
    """
    if group is None and ranks is not None:  # only the type is asked for
        return mx.zeros((ranks * x.shape[0], *x.shape[1:]) if x.ndim else (ranks,), x.dtype)
    return mx.distributed.all_gather(x, group=_group(group), stream=stream)


def join(
    x: mx.array, axis: int, length: int, ranks: int, *, group: Any = None, stream: Any = None
) -> mx.array:
    """All ranks' parts joined along `axis`, without what they reach beyond `length`.

    It stands for the collective where a state leaves a program; `analysis/meshes` lowers it.
    """
    shape = list(x.shape)
    shape[axis] = length
    if group is None:
        return mx.zeros(shape, x.dtype)
    whole = mx.distributed.all_gather(x[None], group=group, stream=stream)
    whole = mx.moveaxis(whole, 0, axis).flatten(axis, axis + 1)
    return mx.take(whole, mx.arange(length), axis=axis) if whole.shape[axis] > length else whole


def sum_scatter(
    x: mx.array, ranks: int | None = None, *, group: Any = None, stream: Any = None
) -> mx.array:
    """This rank's part, along the first axis, of the sum of all ranks' `x`.

    Only `nccl` has it (MLX 0.32.4): elsewhere all is summed, and the part taken.
    """
    if group is None and ranks is not None:
        return mx.zeros((x.shape[0] // ranks, *x.shape[1:]), x.dtype)
    group = _group(group)
    if launched_backend() == "nccl":
        return mx.distributed.sum_scatter(x, group=group, stream=stream)
    rows = x.shape[0] // group.size()
    whole = all_sum(x, group=group, stream=stream)
    return whole[group.rank() * rows : (group.rank() + 1) * rows]


def send(x: mx.array, dst: int, *, group: Any = None, stream: Any = None) -> mx.array:
    """Send `x` to rank `dst`; gives `x`, which must be read for it to be sent."""
    if group is None and mx.distributed.init().size() == 1:
        return mx.stop_gradient(x)
    return mx.distributed.send(x, dst, group=_group(group), stream=stream)


def recv(
    shape: Sequence[int], dtype: mx.Dtype, src: int, *, group: Any = None, stream: Any = None
) -> mx.array:
    """What rank `src` sends."""
    if group is None and mx.distributed.init().size() == 1:
        return mx.zeros(shape, dtype)
    return mx.distributed.recv(shape, dtype, src, group=_group(group), stream=stream)


def part(x: mx.array, axis: int, size: int, ranks: int, rank: int = 0) -> mx.array:
    """Of `ranks` parts of `x` along `axis`, each `size` long, the one that `rank` holds.

    The last ones may reach beyond the end: zeros stand there.
    """
    length = x.shape[axis]
    start, stop = min(rank * size, length), min((rank + 1) * size, length)
    places: list[slice] = [slice(None)] * x.ndim
    places[axis] = slice(start, stop)
    found = x[tuple(places)]
    if stop - start == size:
        return found
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - (stop - start))
    return mx.pad(found, widths)
