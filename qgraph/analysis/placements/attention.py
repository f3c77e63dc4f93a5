"""Rules of attention: heads of keys and values are split, each with the queries that share it."""

from __future__ import annotations

from collections.abc import Callable

from ...ir.graph import Node
from .spec import Dim, Dims, Spec, no_axes, of_sizes, own_axes

Rule = Callable[[Node], Spec | None]


def attention(node: Node) -> Spec:
    q, k = node.operand("q"), node.operand("k")
    shared = q.shape[1] // k.shape[1]
    queries: Dims = (Dim("b"), Dim("h", shared), None, None)
    keys: Dims = (Dim("b"), Dim("h"), None, None)
    operands: list[Dims] = [queries, keys, keys]
    mask, sinks = node.value("mask"), node.value("sinks")
    named = {mask: "mask", sinks: "sinks"}
    for value in node.inputs[3:]:
        if named.get(value) == "sinks":
            operands.append((Dim("h", shared),))
        elif value.ndim == 4:
            heads = Dim("h", shared) if value.shape[1] == q.shape[1] else None
            operands.append((Dim("b"), heads, None, None))
        else:
            operands.append(no_axes(value))
    return of_sizes(operands, [queries], node)


def rope(node: Node) -> Spec:
    """Positions and rotated elements are whole; offsets for rows of a batch go with them."""
    a = node.operand("a")
    axes = own_axes(a, (-1, -2))
    offset = node.value("offset")
    operands = [
        axes if v is a else (Dim(0),) if v is offset and v.ndim == 1 else no_axes(v)
        for v in node.inputs
    ]
    return of_sizes(operands, [axes], node)


RULES: dict[str, Rule] = {
    "fast.scaled_dot_product_attention": attention,
    "fast.rope": rope,
}
