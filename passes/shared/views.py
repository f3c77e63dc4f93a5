"""Views that keep all elements of their operand in order."""

from __future__ import annotations

from itertools import pairwise

from qgraph.ir.graph import Node, Value

from .indexing import is_whole

_RESHAPING = frozenset({"reshape", "expand_dims", "squeeze", "flatten", "unflatten"})


def keeps_order(node: Node) -> bool:
    """Does a node give all elements of its first operand in the same order?

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: (x.transpose(1, 0, 2), x.transpose(0, 2, 1)), qg.spec((1, 4, 4)))
    >>> [keeps_order(node) for node in graph.nodes]
    [True, False]
    """
    if node.op in _RESHAPING:
        return True
    if node.op == "broadcast_to":
        return node.inputs[0].type.size == node.output.type.size
    if node.op == "getitem":
        return is_whole(node)
    if node.op != "transpose":
        return False
    shape = node.inputs[0].shape
    axes = [a % len(shape) for a in node.args.get("axes") or reversed(range(len(shape)))]
    return all(a < b for a, b in pairwise(a for a in axes if shape[a] != 1))


def is_plain(node: Node) -> bool:
    """Is it a view that keeps order, of the run step and with no stream of its own?"""
    return node.stream is None and node.stage == "run" and keeps_order(node)


def without_views(value: Value) -> Value:
    """The value before views that keep all its elements in order."""
    while is_plain(value.node):
        value = value.node.inputs[0]
    return value
