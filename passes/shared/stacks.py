"""Quantize a stack of weights whole, not slice by slice in the loop over its layers.

Groups run along the last axis, so that the parts of a slice are the slices of the parts: exact.

    scan(lambda h, w: (quantized_matmul(h, w), None), x, stack)
    fori_loop(0, n, lambda i, h: quantized_matmul(h, stack[i]), x)

quantize at every turn what is fixed; whole, it is for `hoist-quantize` to move.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qgraph.analysis.changes import PARAMETERS, changes
from qgraph.ir.graph import Graph, Node, Value, input_value
from qgraph.ir.loops import CONTROL_FLOW, LOOPS, body_inputs
from qgraph.origin import stating
from qgraph.rewrite.ledger import Entry, record, weight_name
from qgraph.rewrite.rewriter import rewrite_each
from qgraph.tracing.tensor import Tensor, apply

from .indexing import index_of


def quantize_whole(graph: Graph, made_by: str) -> Graph:
    """The graph with such quantizes on the stack; one that has none is returned as it was.

    Stacks that come in at each call stay: they would be quantized as often either way.
    """
    if graph.ops.isdisjoint(CONTROL_FLOW):
        return graph
    known = changes(graph)
    weights = {value for value, change in known.items() if change.level <= PARAMETERS}

    def visit(node: Node) -> Sequence[Value] | None:
        new = _by_index(node, weights, made_by)
        new = _by_slice(new, weights, made_by) if new.op == "scan" else new
        return None if new is node else new.outputs

    return rewrite_each(graph, visit, made_by, LOOPS)


def _quantized(stack: Value, like: Node, made_by: str) -> Sequence[Tensor]:
    settings = {name: arg for name, arg in like.args.items() if name != "w"}
    with stating(like.origin.by(made_by)):
        parts: Sequence[Tensor] = apply("quantize", (Tensor(stack),), settings, like.stream)
    reason = "of all layers at once, not at each turn"
    record(Entry.of(like, made_by, "hoisted", reason, name=weight_name(stack)))
    return parts


def _by_index(node: Node, weights: Collection[Value], made_by: str) -> Node:
    """`quantize(stack[i])`, of a stack that the loop takes as it is, as `quantize(stack)[i]`."""
    body = node.bodies[-1]
    fixed = {inner for inner, _ in body_inputs(node)[-1][1] if inner in weights}

    def visit(inner: Node) -> Sequence[Value] | None:
        if len(inner.inputs) > 1:
            return None
        picked = inner.operand("w").node
        if picked.op != "getitem" or picked.operand("a") not in fixed or not _is_row(picked):
            return None
        place = tuple(Tensor(i) if isinstance(i, Value) else i for i in index_of(picked))
        parts = _quantized(picked.operand("a"), inner, made_by)
        return [apply("getitem", (part, place)).value for part in parts]

    new = rewrite_each(body, visit, made_by, ("quantize",))
    return node if new is body else node.replace(bodies=(*node.bodies[:-1], new))


def _is_row(picked: Node) -> bool:
    """Does it pick one slice of the leading axes, with a number that the run gives?"""
    places = index_of(picked)
    numbers = [i for i in places if isinstance(i, int) or (isinstance(i, Value) and i.ndim == 0)]
    whole = len(numbers) == len(places) < picked.operand("a").ndim - 1
    return whole and any(isinstance(i, Value) for i in places)


def _by_slice(node: Node, weights: Collection[Value], made_by: str) -> Node:
    """`quantize(x)` of a slice of xs: slices of the quantized xs come in beside it."""
    body = node.bodies[0]
    start, xs = len(node.args["carried"]), list(node.args["xs"])
    slices = dict(zip(body.inputs[start:], xs, strict=False))
    now: dict[Value, Value] = {}
    nodes: list[Node] = []
    for inner in body.nodes:
        stack = slices.get(inner.inputs[0]) if len(inner.inputs) == 1 else None
        if inner.op != "quantize" or stack not in weights:
            nodes.append(inner.with_inputs(now))
            now.update(zip(inner.outputs, nodes[-1].outputs, strict=True))
            continue
        assert stack is not None
        xs += [part.value for part in _quantized(stack, inner, made_by)]
        name = inner.inputs[0].node.args["name"]
        now.update((v, input_value(v.type, f"{name}.{i}")) for i, v in enumerate(inner.outputs))
    added = len(xs) - len(slices)
    if not added:
        return node
    split = start + len(slices)
    fresh = [v for v in now.values() if v.node.op == "input"]
    new = body.replace(
        inputs=[*body.inputs[:split], *fresh, *body.inputs[split:]],
        nodes=nodes,
        outputs=[now.get(v, v) for v in body.outputs],
    )
    return node.replace(args={**node.args, "xs": tuple(xs)}, bodies=(new,))
