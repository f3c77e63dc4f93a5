"""An addition with the norm after it, and what stands before it, become one launch on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.loops import REGION
from qgraph.rewrite.ledger import Entry, record
from qgraph.rewrite.rewriter import with_bodies
from qgraph.runtime.regions.cuda.region import KERNEL
from qgraph.runtime.regions.cuda.residual import AddNorm

from ..form_regions import region_of


def in_one_launch(
    graph: Graph, find: Callable[[Graph, Node], AddNorm | None], name: str, why: str
) -> Graph:
    """The graph with a region for each that is found, in its loops as well.

    Args:
        find: what begins with a node of a graph; its last two nodes are the addition, in whose
            place the region comes, and the norm.
        name: of the pass.
        why: what the ledger says.
    """
    nodes = _known_first(graph.nodes)
    at = {node: i for i, node in enumerate(nodes)}
    adds: dict[Node, AddNorm] = {}
    for node in nodes:
        each = find(graph, node)
        if each is not None and at.get(each.weight.node, -1) < at[each.nodes[-2]]:
            adds.setdefault(each.nodes[-2], each)
    if not adds and not any(node.bodies for node in nodes):
        return graph
    gone = {node for each in adds.values() for node in each.nodes if node not in adds}
    replace: dict[Value, Value] = {}
    done: dict[Node, None] = {}
    for node in nodes:
        if node in gone:
            continue
        if (each := adds.get(node)) is not None:
            done[region_of(graph, each.nodes, replace, name, KERNEL)] = None
            record(Entry.of(each.nodes[0], name, "fused", why, 1))
            continue
        new = node.with_inputs(replace)
        if new.op != REGION:
            new = with_bodies(new, lambda body: in_one_launch(body, find, name, why))
        done[new] = None
        replace.update((a, b) for a, b in zip(node.outputs, new.outputs, strict=True) if a is not b)
    if not adds and all(a is b for a, b in zip(nodes, done, strict=True)):
        return graph
    return graph.replace(nodes=list(done), outputs=[replace.get(v, v) for v in graph.outputs])


def _known_first(nodes: Sequence[Node]) -> list[Node]:
    """What is known before the program runs, such as a norm's `1 + weight`, and then the rest: a
    region stands in the place of the addition, before which its weight must be there."""

    def runs(node: Node) -> bool:
        return node.stage == "run" and node.op != "constant"

    return sorted(nodes, key=runs)
