"""Regions dissolved: their nodes stand in the graph again."""

from __future__ import annotations

from ..ir.graph import Graph, Node, Value
from ..ir.loops import REGION
from .rewriter import with_bodies


def inlined(graph: Graph) -> Graph:
    """The graph with the nodes of each region, at any depth, in its place.

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: qg.exp(x) + 1, qg.spec((4,)))
    >>> inlined(graph) is graph
    True
    """
    nodes: list[Node] = []
    replace: dict[Value, Value] = {}
    changed = False
    for old in graph.nodes:
        node = with_bodies(old.with_inputs(replace), inlined)
        changed = changed or node is not old
        if node.op == REGION:
            body = node.bodies[0]
            inner = dict(zip(body.inputs, node.args["invariants"], strict=True))
            for each in body.nodes:
                new = each.with_inputs(inner)
                nodes.append(new)
                inner.update(zip(each.outputs, new.outputs, strict=True))
            results = [inner.get(v, v) for v in body.outputs]
            replace.update(zip(old.outputs, results, strict=True))
            changed = True
            continue
        nodes.append(node)
        if node is not old:
            replace.update(zip(old.outputs, node.outputs, strict=True))
    if not changed:
        return graph
    return graph.replace(nodes=nodes, outputs=[replace.get(v, v) for v in graph.outputs])
