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
    """Does a `getitem` give all elements of its operand, with new axes at most?"""
    return all(p is None or p is Ellipsis or p == slice(None) for p in index_of(node))
