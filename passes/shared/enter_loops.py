"""Take a `dequantize` into the loops and branches that multiply by it.

    w = dequantize(q).T
    fori_loop(0, n, lambda i, h: tanh(h @ w), x)

keeps w dense for all of the loop.  Inside, its products and look-ups fuse, and the loop takes the
packed parts.  A `dequantize` enters only where all that reads it does fuse: else it would run at
every turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qgraph.ir.graph import Graph, Node, Value, input_value
from qgraph.ir.kinds import SAME_ELEMENTS
from qgraph.ir.loops import CONTROL_FLOW, body_inputs, invariant_names
from qgraph.rewrite.ledger import Entry, record, weight_name
from qgraph.rewrite.rewriter import rewrite_each
from qgraph.types import TensorType

NeedsDense = Callable[[Graph, Node], bool]
"""Does anything in the graph need this `dequantize` as it is?"""


def into_bodies(graph: Graph, needs_dense: NeedsDense, made_by: str) -> Graph:
    """The graph with such dequantizes inside, at any depth."""

    def visit(node: Node) -> Sequence[Value] | None:
        new = node
        for which, name in enumerate(invariant_names(node)):
            for outer in dict.fromkeys(node.args[name]):
                if chain := _chain(outer):
                    new = _tried(new, which, name, chain)
        if node.op == "scan":
            for outer in dict.fromkeys(node.args["xs"]):
                if outer.node.op == "dequantize" and outer.ndim > 2:
                    new = _tried(new, 0, "xs", [outer.node])
        return None if new is node else new.outputs

    def _tried(node: Node, which: int, name: str, chain: list[Node]) -> Node:
        """The node with the weight inside, or as it was if not all fuses there."""
        entered, inside = _enter(node, which, name, chain)
        body = into_bodies(entered.bodies[which], needs_dense, made_by)
        if needs_dense(body, inside):
            return node
        source = chain[0]
        reason, weight = f"into the {node.op} that multiplies by it", source.operand("w")
        record(Entry.of(source, made_by, "fused", reason, name=weight_name(weight)))
        bodies = tuple(body if i == which else b for i, b in enumerate(entered.bodies))
        return entered.replace(bodies=bodies)

    return rewrite_each(graph, visit, made_by, CONTROL_FLOW)


def _chain(value: Value) -> list[Node]:
    """The `dequantize` that `value` is a view of and the views after it; empty if it is none."""
    chain = [value.node]
    while chain[0].op in SAME_ELEMENTS and chain[0].inputs:
        chain.insert(0, chain[0].inputs[0].node)
    return chain if chain[0].op == "dequantize" else []


def _enter(node: Node, which: int, name: str, chain: list[Node]) -> tuple[Node, Node]:
    """`node` with copies of `chain` in a body, and the copied `dequantize`.

    The last of the chain is an operand `name`; the packed parts take its place.  Of stacked
    operands, `xs`, it is a slice that is dequantized at each turn.
    """
    body, outer, source = node.bodies[which], chain[-1].output, chain[0]
    own, shared = body_inputs(node)[which]
    start = len(node.args["carried"])
    pairs = list(zip(own[start:], node.args["xs"], strict=True)) if name == "xs" else shared
    gone = {inner for inner, operand in pairs if operand is outer}
    axes = 1 if name == "xs" else 0
    fresh = {
        part: input_value(TensorType(part.shape[axes:], part.dtype), weight_name(part))
        for part in source.inputs
    }
    now: dict[Value, Value] = dict(fresh)
    inside = source.with_inputs(now)
    if axes:
        inside = inside.replace(types=[TensorType(outer.shape[axes:], outer.dtype)])
    now[source.output] = inside.output
    nodes = [inside]
    for step in chain[1:]:
        nodes.append(step.with_inputs(now))
        now[step.output] = nodes[-1].output
    now.update(dict.fromkeys(gone, nodes[-1].output))
    for step in body.nodes:
        nodes.append(step.with_inputs(now))
        now.update(zip(step.outputs, nodes[-1].outputs, strict=True))
    kept = [inner for inner, _ in pairs if inner not in gone]
    rest = [inner for inner, _ in shared] if axes else []
    first = own[:start] if axes else own
    new = body.replace(
        inputs=[*first, *kept, *fresh.values(), *rest],
        nodes=nodes,
        outputs=[now.get(v, v) for v in body.outputs],
    )
    operands = (*(operand for _, operand in pairs if operand is not outer), *fresh)
    bodies = tuple(new if i == which else b for i, b in enumerate(node.bodies))
    return node.replace(args={**node.args, name: operands}, bodies=bodies), inside
