"""A node on other operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qgraph.ir.graph import Node, Value, map_values
from qgraph.ir.ops import OPS
from qgraph.tracing.nodes import infer


def rebuilt(node: Node, local: Sequence[Value], changed: Mapping[str, Any]) -> Node:
    """The node on other operands, its types inferred anew; this very node if they are its own."""
    if not changed and all(new is old for new, old in zip(local, node.inputs, strict=True)):
        return node
    given = iter(local)
    args = {n: map_values(a, lambda _: next(given)) for n, a in node.args.items()}
    args |= changed
    return node.replace(args=args, types=infer(OPS[node.op], args)[0])
