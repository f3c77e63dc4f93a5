"""Ops that only look at their operand in another way: no step at all."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ....ir.graph import Node, Value
from ....ir.ops import setting
from ..arrays import Array
from .refs import Unknown


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


def _bits(node: Node, of: Callable[[Value], Array]) -> Array:
    a, dtype = of(node.inputs[0]), node.output.dtype
    if dtype.size != a.dtype.size:
        raise Unknown("view as a dtype of another size")
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
    given = node.args["index"]
    index: list[Any] = list(given) if isinstance(given, tuple) else [given]
    if any(not (i is None or i is Ellipsis or isinstance(i, int | builtins.slice))
           or isinstance(i, bool) for i in index):  # fmt: skip
        raise Unknown("an index that holds arrays")
    taken = sum(i is not None and i is not Ellipsis for i in index)
    rest = [builtins.slice(None)] * (a.ndim - taken)
    at = index.index(Ellipsis) if Ellipsis in index else len(index)
    axis = 0
    for i in [*index[:at], *rest, *index[at + 1 :]]:
        if i is None:
            shape, strides = list(a.shape), list(a.strides)
            shape.insert(axis, 1)
            strides.insert(axis, 0)
            a = replace(a, shape=tuple(shape), strides=tuple(strides))
            axis += 1
        elif isinstance(i, int):
            a = a.sliced(axis, i % a.shape[axis], 1).without(axis)
        else:
            numbers = range(*i.indices(a.shape[axis]))
            a = a.sliced(axis, numbers.start, len(numbers), numbers.step)
            axis += 1
    return a


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
