"""Rules of ops that pick elements by their places, or put some there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...ir.graph import Node, Value
from ...ir.ops import setting
from ...types import TensorType
from .spec import Dim, Dims, Spec, no_axes, of_sizes, own_axes

Rule = Callable[[Node], Spec | None]


def take(node: Node) -> Spec | None:
    """Rows of a table, which may be split between the rows too: each is then right on one rank."""
    a = node.operand("a")
    indices = node.value("indices")
    axis = setting(node, "axis")
    if axis is None or a is indices:
        return None
    axis %= a.ndim
    own = own_axes(a, (axis,))
    picked: Dims = () if indices is None else tuple(Dim(("i", n)) for n in range(indices.ndim))
    result = (*own[:axis], *picked, *own[axis + 1 :])
    operands = [own] if indices is None else [own, picked]
    table = (0, 1) if axis == 0 and indices is not None else None
    return of_sizes(operands, [result], node, partial="first", table=table)


def take_along_axis(node: Node) -> Spec | None:
    a, indices = node.operand("a"), node.operand("indices")
    axis = setting(node, "axis")
    if axis is None or a.ndim != indices.ndim or a is indices:
        return None
    operands = [own_axes(a, (axis,)), own_axes(indices, (axis,))]
    return of_sizes(operands, [own_axes(node.output, (axis,))], node)


def getitem(node: Node) -> Spec | None:
    """Axes that are taken whole stay; a row that an index picks is a row of a table."""
    a = node.operand("a")
    index = node.args["index"]
    places = list(index) if isinstance(index, tuple) else [index]
    arrays = [p for p in places if isinstance(p, Value)]
    if len(arrays) > 1 or any(isinstance(p, tuple | bool) for p in places) or a in arrays:
        return None
    if arrays and (arrays[0].ndim and any(isinstance(p, int) for p in places)):
        return None
    taken = sum(p is not None and p is not Ellipsis for p in places)
    whole: list[Any] = [slice(None)] * (a.ndim - taken)
    if Ellipsis in [p for p in places if not isinstance(p, Value)]:
        at = next(i for i, p in enumerate(places) if p is Ellipsis)
        places[at : at + 1] = whole
    else:
        places += whole
    operand: list[Dim | None] = []
    result: list[Dim | None] = []
    for place in places:
        axis = len(operand)
        if place is None:
            result.append(None)
        elif isinstance(place, int):
            operand.append(None)
        elif isinstance(place, Value):
            operand.append(None)
            result += [None] * place.ndim
        else:
            dim = Dim(axis) if is_whole(place, a.shape[axis]) else None
            operand.append(dim)
            result.append(dim)
    operands: list[Dims] = [tuple(operand), *(no_axes(v) for v in arrays)]
    table = None
    if arrays and isinstance(places[0], Value) and arrays[0].ndim:
        table = (0, 1)
    return of_sizes(
        operands, [tuple(result)], node, partial="first", local_args=_whole_slices, table=table
    )


def is_whole(place: Any, length: int) -> bool:
    """Does a slice take all of an axis, in order?"""
    return (
        isinstance(place, slice)
        and place.start in (None, 0)
        and place.step in (None, 1)
        and (place.stop is None or (isinstance(place.stop, int) and place.stop >= length))
    )


def _whole_slices(
    node: Node, operands: Sequence[TensorType], results: Sequence[TensorType]
) -> Mapping[str, Any]:
    """The index without ends of axes that are taken whole: parts end elsewhere."""
    index = node.args["index"]
    places = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(p, slice) and p.stop is not None for p in places):
        return {}
    shape = node.operand("a").shape
    taken = sum(p is not None and p is not Ellipsis for p in places)
    axis, found = 0, []
    for place in places:
        if place is Ellipsis:
            axis += len(shape) - taken
        elif place is not None:
            if is_whole(place, shape[axis]):
                place = slice(None)
            axis += 1
        found.append(place)
    return {"index": tuple(found) if isinstance(index, tuple) else found[0]}


def slicing(node: Node) -> Spec:
    """`slice` with starts that the run gives: axes that it takes whole stay."""
    a, out = node.operand("a"), node.output
    cut = [i for i in range(a.ndim) if a.shape[i] != out.shape[i]]
    operands = [own_axes(a, cut), *(no_axes(v) for v in node.inputs[1:])]
    return of_sizes(operands, [own_axes(out, cut)], node, local_args=_slice_size, partial="first")


def _slice_size(
    node: Node, operands: Sequence[TensorType], results: Sequence[TensorType]
) -> Mapping[str, Any]:
    return {"slice_size": results[0].shape}


def slice_update(node: Node) -> Spec:
    """A cache: what is not cut by the update may be split, heads above all."""
    a, update = node.operand("a"), node.operand("update")
    cut = {axis % a.ndim for axis in node.args["axes"]}
    cut |= {i for i in range(a.ndim) if a.shape[i] != update.shape[i]}
    axes = own_axes(a, tuple(cut))
    operands = [axes if v in (a, update) else no_axes(v) for v in node.inputs]
    return of_sizes(operands, [axes], node)


def at_update(node: Node) -> Spec | None:
    """`x.at[:, :, i:j].set(update)`, with places known now."""
    a, updates = node.operand("a"), node.value("updates")
    index = node.args["index"]
    places = list(index) if isinstance(index, tuple) else [index]
    if updates is None or a is updates or any(isinstance(p, Value) for p in places):
        return None
    if not all(isinstance(p, slice) for p in places):
        return None
    places += [slice(None)] * (a.ndim - len(places))
    if updates.ndim != a.ndim:
        return None
    cut = [i for i, p in enumerate(places) if not is_whole(p, a.shape[i])]
    cut += [i for i in range(a.ndim) if a.shape[i] != updates.shape[i]]
    axes = own_axes(a, cut)
    return of_sizes([axes, axes], [axes], node, local_args=_whole_slices)


RULES: dict[str, Rule] = {
    "take": take,
    "take_along_axis": take_along_axis,
    "getitem": getitem,
    "slice": slicing,
    "slice_update": slice_update,
    **{
        f"at_{name}": at_update
        for name in ("set", "add", "subtract", "multiply", "divide", "maximum", "minimum")
    },
}
