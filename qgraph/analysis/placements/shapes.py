"""Rules of ops that lay elements out in another way, join them or make them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ...ir.graph import Node
from ...ir.ops import setting
from ...types import TensorType
from .spec import Dim, Dims, Spec, from_right, of_sizes, own_axes

Rule = Callable[[Node], Spec | None]


def _new_shape(
    node: Node, operands: Sequence[TensorType], results: Sequence[TensorType]
) -> Mapping[str, Any]:
    return {"shape": results[0].shape}


def permutation(node: Node) -> Spec:
    """An axis goes where it is moved to."""
    a = node.inputs[0]
    order = _order(node, a.ndim)
    return of_sizes([own_axes(a)], [tuple(Dim(i) for i in order)], node, partial="first")


def _order(node: Node, ndim: int) -> Sequence[int]:
    axes = list(range(ndim))
    if node.op == "transpose":
        given = node.args.get("axes")
        return axes[::-1] if given is None else [axis % ndim for axis in given]
    if node.op == "matrix_transpose":
        return [*axes[:-2], axes[-1], axes[-2]]
    if node.op == "swapaxes":
        i, j = node.args["axis1"] % ndim, node.args["axis2"] % ndim
        axes[i], axes[j] = axes[j], axes[i]
        return axes
    source, destination = node.args["source"] % ndim, node.args["destination"] % ndim
    axes.remove(source)
    axes.insert(destination, source)
    return axes


def reshape(node: Node) -> Spec:
    """Axes that become one another share a label: the outermost of each group, in whole units."""
    a, out = node.inputs[0], node.output
    before: list[Dim | None] = [None] * a.ndim
    after: list[Dim | None] = [None] * out.ndim
    for i, j in groups(a.shape, out.shape):
        unit = math.gcd(a.shape[i], out.shape[j])
        if unit > 1:
            before[i] = Dim(i, a.shape[i] // unit)
            after[j] = Dim(i, out.shape[j] // unit)
    local_args = _new_shape if "shape" in node.args and node.op == "reshape" else None
    if node.op == "unflatten":
        local_args = _unflattened
    return of_sizes([tuple(before)], [tuple(after)], node, partial="first", local_args=local_args)


def _unflattened(
    node: Node, operands: Sequence[TensorType], results: Sequence[TensorType]
) -> Mapping[str, Any]:
    axis = node.args["axis"] % operands[0].ndim
    more = results[0].ndim - operands[0].ndim + 1
    return {"shape": results[0].shape[axis : axis + more]}


def groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The outermost axis on both sides of each group of axes that a reshape makes of one another.

    >>> list(groups((1, 5, 576), (1, 5, 9, 64)))
    [(0, 0), (1, 1), (2, 2)]
    >>> list(groups((2, 9, 64, 7), (18, 64, 7)))
    [(0, 0), (2, 1), (3, 2)]
    """
    i = j = 0
    while i < len(before) and j < len(after):
        first = i, j
        left, right = before[i], after[j]
        while left != right:
            if left < right:
                i += 1
                left *= before[i]
            else:
                j += 1
                right *= after[j]
        # Axes of one element before the outermost one of more bear no part of the split.
        k, m = first
        while k < i and before[k] == 1:
            k += 1
        while m < j and after[m] == 1:
            m += 1
        yield k, m
        i, j = i + 1, j + 1


def broadcast(node: Node) -> Spec:
    operands = [from_right(v) for v in node.inputs]
    return of_sizes(operands, [from_right(node.output)], node, local_args=_new_shape)


def joining(node: Node) -> Spec:
    """All axes but the one that is joined or split along."""
    if node.op == "stack":
        ndim = node.output.ndim
        axis = setting(node, "axis") % ndim
        labels = [Dim(i) for i in range(ndim - 1)]
        result: Dims = (*labels[:axis], None, *labels[axis:])
        return of_sizes([tuple(labels)] * len(node.inputs), [result], node, partial="all")
    axis = setting(node, "axis")
    operands = [own_axes(v, (axis,)) for v in node.inputs]
    partial = "all" if node.op == "concatenate" else "first"
    return of_sizes(operands, [own_axes(v, (axis,)) for v in node.outputs], node, partial=partial)


def pad(node: Node) -> Spec | None:
    a = node.inputs[0]
    if len(node.inputs) > 1:
        return None
    grown = [i for i in range(a.ndim) if a.shape[i] != node.output.shape[i]]
    return of_sizes([own_axes(a, grown)], [own_axes(node.output, grown)], node)


def filled(node: Node) -> Spec | None:
    """A tensor of one value, any part of which is as good as another."""
    if any(v.ndim for v in node.inputs):
        return None
    operands: list[Dims] = [() for _ in node.inputs]
    return of_sizes(operands, [own_axes(node.output)], node, local_args=_new_shape)


def filled_like(node: Node) -> Spec:
    operands = [own_axes(node.inputs[0]), *(from_right(v) for v in node.inputs[1:])]
    return of_sizes(operands, [own_axes(node.output)], node)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("transpose", "matrix_transpose", "swapaxes", "moveaxis"), permutation),
    **dict.fromkeys(
        ("reshape", "flatten", "unflatten", "expand_dims", "squeeze", "contiguous"), reshape
    ),
    "broadcast_to": broadcast,
    **dict.fromkeys(("concatenate", "split", "stack"), joining),
    "pad": pad,
    **dict.fromkeys(("zeros", "ones", "full"), filled),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like"), filled_like),
}
