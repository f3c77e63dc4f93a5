"""A spread graph as one rank runs it."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.graph import Graph, Node, Value
from ...rewrite.rewriter import Visit, rewrite
from ...tracing.tensor import Tensor, apply
from .messages import messages
from .ops import is_part, part_of


def for_rank(graph: Graph, rank: int) -> Graph:
    """The graph with the parts that `rank` holds, known by their places."""

    def visitor(inner: Graph) -> Visit:
        ends = messages(inner)

        def visit(node: Node, old: Node) -> Sequence[Value] | None:
            if node.op == "distributed.join":
                return [_join(node)]
            if is_part(node):
                return [part_of(node, node.operand("x"), rank)]
            return ends[old].on(rank, node) if old in ends else None

        return visit

    return rewrite(graph, visitor, "")


def _join(node: Node) -> Value:
    """`distributed.join` in ops."""
    axis, length, ranks = (node.args[name] for name in ("axis", "length", "ranks"))
    x = Tensor(node.operand("x"))
    joined = apply("distributed.all_gather", (apply("expand_dims", (x, 0)), ranks))
    joined = apply("moveaxis", (joined, 0, axis))
    shape = list(x.shape)
    shape[axis] *= ranks
    joined = apply("reshape", (joined, tuple(shape)))
    if shape[axis] > length:
        joined = apply("getitem", (joined, ((slice(None),) * axis + (slice(0, length),))))
    value: Value = joined.value
    return value
