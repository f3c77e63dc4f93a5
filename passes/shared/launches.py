"""An addition with the norm after it, and what stands before it, become one launch on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.loops import REGION
from qgraph.rewrite.ledger import Entry, record
from qgraph.rewrite.rewriter import with_bodies
from qgraph.runtime.regions.cuda.pushed import SumNorm
from qgraph.runtime.regions.cuda.region import KERNEL
from qgraph.runtime.regions.cuda.residual import AddNorm

from ..form_regions import region_of

Found = TypeVar("Found", AddNorm, SumNorm)


def in_one_launch(
    graph: Graph, find: Callable[[Graph, Node], Found | None], name: str, why: str
) -> Graph:
    """The graph with a region for each that is found, in its loops as well.

    Args:
        find: what begins with a node of a graph; its last two nodes are the addition, in whose
            place the region comes, and the norm.
        name: of the pass.
        why: what the ledger says.
    """
    found = [each for node in graph.nodes if (each := find(graph, node)) is not None]
    if found:
        at = {node: i for i, node in enumerate(graph.nodes)}
        found = [each for each in found if _is_there(each.weight, at, at[each.nodes[-2]])]
    if not found and not any(node.bodies for node in graph.nodes):
        return graph
    adds = {each.nodes[-2]: each for each in found}
    gone = {node for each in found for node in each.nodes if node not in adds}
    replace: dict[Value, Value] = {}
    done: dict[Node, None] = {}
    for node in graph.nodes:
        if node in gone or node in done:
            continue
        if (each := adds.get(node)) is not None:
            if each.weight.node.op == "constant":
                done[each.weight.node] = None
            done[region_of(graph, each.nodes, replace, name, KERNEL)] = None
            record(Entry.of(each.nodes[0], name, "fused", why, 1))
            continue
        new = node.with_inputs(replace)
        if new.op != REGION:
            new = with_bodies(new, lambda body: in_one_launch(body, find, name, why))
        done[new] = None
        replace.update((a, b) for a, b in zip(node.outputs, new.outputs, strict=True) if a is not b)
    if not found and all(a is b for a, b in zip(graph.nodes, done, strict=True)):
        return graph
    return graph.replace(nodes=list(done), outputs=[replace.get(v, v) for v in graph.outputs])


def _is_there(weight: Value, at: dict[Node, int], place: int) -> bool:
    """Is a weight known at a place of the graph, or can it be?"""
    return weight.node.op == "constant" or at.get(weight.node, -1) < place
