"""Compute equal things once.

Merges, within one graph or one body:
    1. nodes of the same op, inputs, settings, device and stage.
    2. constants that are the same array, or the same number of the same dtype.
Leaves alone:
    1. loops and branches, which are compared by identity.
    2. `keep`, which holds a value where it is.
    3. messages from rank to rank, each of which is sent.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from qgraph.ir.graph import Graph, Node, Value, map_values
from qgraph.ir.kinds import MESSAGES
from qgraph.rewrite.rewriter import Visit, rewrite


@dataclass(frozen=True)
class EliminateCommonSubexpressions:
    """See the module."""

    name: str = "eliminate-common-subexpressions"
    contract: str = "exact"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite(graph, _visitor, self.name)


def _visitor(graph: Graph) -> Visit:
    seen: dict[Hashable, tuple[Value, ...]] = {}

    def visit(node: Node, _: Node) -> Sequence[Value] | None:
        if node.bodies or node.op == "keep" or node.op in MESSAGES:
            return None
        first = seen.setdefault(key(node), node.outputs)
        return None if first is node.outputs else first

    return visit


def key(node: Node) -> Hashable:
    """Equal for nodes that compute the same."""
    if node.op == "constant":
        data = node.args["data"]
        if node.output.type.shape == () and not data.is_released:
            return ("number", str(node.output.type.dtype), repr(data.array.item()))
        return ("array", id(data) if data.is_released else id(data.array))
    args = tuple((name, repr(map_values(arg, _identity))) for name, arg in node.args.items())
    return (node.op, args, repr(node.stream), node.kernel, node.stage)


def _identity(value: Value) -> str:
    # Marked, so that no static number can be taken for a value.
    return f"value {id(value)}"
