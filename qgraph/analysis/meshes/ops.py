"""Nodes that mean something else on each rank, and what they are made of."""

from __future__ import annotations

from ...ir.graph import Graph, Node, Value
from ...ir.ops import OPS
from ...tracing.tensor import Tensor, apply


def is_collective(node: Node) -> bool:
    return node.op in OPS and OPS[node.op].kind == "collective"


def is_part(node: Node) -> bool:
    return node.op == "distributed.part"


def is_spread(graph: Graph) -> bool:
    """Does what the graph computes depend on the rank that runs it?"""
    return any(is_part(node) or is_collective(node) for _, node in graph.walk())


def part_of(node: Node, whole: Value, rank: int) -> Value:
    """`kernels/collectives.part` in ops; where it is kept a copy, as a slice holds the whole."""
    axis, size = node.args["axis"], node.args["size"]
    length = whole.shape[axis]
    start, stop = min(rank * size, length), min((rank + 1) * size, length)

    def staged(op: str, x: Value, *args: object) -> Value:
        made: Value = apply(op, (Tensor(x), *args)).value.node.replace(stage=node.stage).output
        return made

    found = staged("getitem", whole, ((slice(None),) * axis + (slice(start, stop),)))
    if stop - start < size:
        widths = tuple((0, size - (stop - start) if i == axis else 0) for i in range(whole.ndim))
        return staged("pad", found, widths)
    return found if node.stage == "run" else staged("contiguous", found)
