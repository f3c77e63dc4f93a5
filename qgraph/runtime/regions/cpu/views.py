"""Ops that only look at their operand in another way: no step at all."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ....ir.graph import Node, Value
from ....ir.ops import setting
from ..arrays import Array, row_major
from ..unknown import Unknown


def view(node: Node, of: Callable[[Value], Array]) -> list[Array] | None:
    """The results as views of the operands; None where elements must move.

    Raises:
        Unknown: an index that is no view.
    """
    found = _VIEWS[node.op](node, of)
    if found is None or isinstance(found, list):
        return found
    return [found]


def _reshape(node: Node, of: Callable[[Value], Array]) -> Array | None:
    return of(node.inputs[0]).reshaped(node.output.shape)


def _at_least(node: Node, of: Callable[[Value], Array]) -> list[Array] | None:
    pairs = zip(node.inputs, node.outputs, strict=True)
    found = [of(value).reshaped(out.shape) for value, out in pairs]  # with more axes of size 1
    views = [array for array in found if array is not None]
    if len(found) > 1 and len(views) < len(found):
        raise Unknown("several values of which one must move")
    return views or None


def _same(node: Node, of: Callable[[Value], Array]) -> Array:
    return of(node.inputs[0])


def _transpose(node: Node, of: Callable[[Value], Array]) -> Array:
    a = of(node.inputs[0])
    axes = setting(node, "axes")
    order = [x % a.ndim for x in axes] if axes else list(reversed(range(a.ndim)))
    return a.transposed(order)


def _swap(node: Node, of: Callable[[Value], Array]) -> Array:
    a = of(node.inputs[0])
    one, two = (-1, -2) if node.op == "matrix_transpose" else (
        setting(node, "axis1"), setting(node, "axis2"))  # fmt: skip
    order = list(range(a.ndim))
    order[one], order[two] = order[two], order[one]
    return a.transposed(order)


def _move(node: Node, of: Callable[[Value], Array]) -> Array:
    a = of(node.inputs[0])
    source, goal = (setting(node, name) % a.ndim for name in ("source", "destination"))
    order = [axis for axis in range(a.ndim) if axis != source]
    order.insert(goal, source)
    return a.transposed(order)


def _broadcast(node: Node, of: Callable[[Value], Array]) -> list[Array]:
    return [of(v).broadcast(out.shape) for v, out in zip(node.inputs, node.outputs, strict=True)]


def _bits(node: Node, of: Callable[[Value], Array]) -> Array | None:
    a, dtype = of(node.inputs[0]), node.output.dtype
    if dtype.size != a.dtype.size:
        if not a.is_contiguous:
            raise Unknown("view of elements with gaps as a dtype of another size")
        return replace(
            a, dtype=dtype, shape=node.output.shape, strides=row_major(node.output.shape)
        )
    return replace(a, dtype=dtype)


def _split(node: Node, of: Callable[[Value], Array]) -> list[Array]:
    a, axis = of(node.inputs[0]), setting(node, "axis")
    axis %= a.ndim
    parts, start = [], 0
    for out in node.outputs:
        length = out.shape[axis]
        parts.append(a.sliced(axis, start, length))
        start += length
    return parts


def _unstack(node: Node, of: Callable[[Value], Array]) -> list[Array]:
    a = of(node.inputs[0])
    axis = setting(node, "axis") % a.ndim
    return [a.sliced(axis, i, 1).without(axis) for i in range(a.shape[axis])]


def _getitem(node: Node, of: Callable[[Value], Array]) -> Array:
    a = of(node.inputs[0])
    axis = 0
    for item in spelled_out(node.args["index"], a.ndim):
        a, axis = by_item(a, axis, item)
    return a


def spelled_out(index: Any, ndim: int) -> list[Any]:
    """The items of an index, with a slice for each axis that it does not name.

    >>> spelled_out((0, Ellipsis, None), 3)
    [0, slice(None, None, None), slice(None, None, None), None]
    """
    items: list[Any] = list(index) if isinstance(index, tuple | list) else [index]
    known = (int, builtins.slice, Value)
    if any(
        isinstance(i, bool) or not (i is None or i is Ellipsis or isinstance(i, known))
        for i in items
    ):
        raise Unknown("an index of another kind than numbers, slices and arrays")
    taken = sum(i is not None and i is not Ellipsis for i in items)
    rest = [builtins.slice(None)] * (ndim - taken)
    at = items.index(Ellipsis) if any(i is Ellipsis for i in items) else len(items)
    return [*items[:at], *rest, *items[at + 1 :]]


def by_item(a: Array, axis: int, item: Any) -> tuple[Array, int]:
    """An array by an item of an index (None, a number, a slice), and the axis that follows."""
    if item is None:
        shape, strides = list(a.shape), list(a.strides)
        shape.insert(axis, 1)
        strides.insert(axis, 0)
        return replace(a, shape=tuple(shape), strides=tuple(strides)), axis + 1
    if isinstance(item, int):
        return a.sliced(axis, item % a.shape[axis], 1).without(axis), axis
    numbers = range(*item.indices(a.shape[axis]))
    return a.sliced(axis, numbers.start, len(numbers), numbers.step), axis + 1


def _flip(node: Node, of: Callable[[Value], Array]) -> Array:
    a = of(node.inputs[0])
    axes = setting(node, "axis")
    for axis in _axes(axes, a.ndim):
        a = a.sliced(axis, a.shape[axis] - 1, a.shape[axis], -1) if a.shape[axis] else a
    return a


def _axes(axes: Any, ndim: int) -> Sequence[int]:
    if axes is None:
        return range(ndim)
    return [x % ndim for x in (axes if isinstance(axes, tuple) else (axes,))]


_VIEWS: dict[str, Callable[[Node, Callable[[Value], Array]], Array | list[Array] | None]] = {
    **dict.fromkeys(
        ("reshape", "flatten", "unflatten", "expand_dims", "squeeze"), _reshape),
    **dict.fromkeys(("atleast_1d", "atleast_2d", "atleast_3d"), _at_least),
    **dict.fromkeys(("stop_gradient", "contiguous", "positive", "keep"), _same),
    "transpose": _transpose,
    "matrix_transpose": _swap,
    "swapaxes": _swap,
    "moveaxis": _move,
    "broadcast_to": _broadcast,
    "broadcast_arrays": _broadcast,
    "view": _bits,
    "split": _split,
    "unstack": _unstack,
    "getitem": _getitem,
    "flip": _flip,
}  # fmt: skip

VIEWS = frozenset(_VIEWS)


def is_view(node: Node) -> bool:
    """Does a node only look at its operand in another way?"""
    return node.op in VIEWS and (node.op != "getitem" or len(node.inputs) == 1)
