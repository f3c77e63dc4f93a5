"""What a `getitem` is asked for."""

from __future__ import annotations

from typing import Any

from qgraph.ir.graph import Node


def index_of(node: Node) -> tuple[Any, ...]:
    """The index of a `getitem`, part by part, also where it is one alone.

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: (x[0], x[0, None]), qg.spec((4, 4)))
    >>> [index_of(node) for node in graph.nodes]
    [(0,), (0, None)]
    """
    index = node.args["index"]
    return index if isinstance(index, tuple) else (index,)


def is_whole(node: Node) -> bool:
    """Does a `getitem` give all elements of its operand, in order?

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: (x[:, 0, None], x[0], x[::-1, 0]), qg.spec((4, 1)))
    >>> [is_whole(node) for node in graph.nodes]
    [True, False, False]
    """
    if node.inputs[0].type.size != node.output.type.size:
        return False
    return all(
        p is None or p is Ellipsis or isinstance(p, int)
        or (isinstance(p, slice) and (p.step is None or p.step > 0))
        for p in index_of(node)
    )  # fmt: skip
