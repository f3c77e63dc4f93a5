"""A sum over two GPUs, the residual that is added and the norm after them become one launch.

Rewrites (exact but for the order in which squares are added up):
    1. an `all_sum` of any number of rows, an `add` and an `rms_norm` become one `region`. What was
       added stays a result where others read it.
Leaves alone:
    1. sums that are in a region of a few rows already.
    2. sums that something else reads, or whose residual or weight is of another type.
    3. rows that do not fit in a block's threads, and values that do not fit in the shared memory.
    4. meshes of more than two ranks, of one process, of CPUs.

Runs after regions are formed on GPUs. Where the GPUs reach no memory of each other, the body runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.loops import REGION
from qgraph.rewrite.ledger import Entry, record
from qgraph.rewrite.rewriter import with_bodies
from qgraph.runtime.regions.cuda.peers import may_connect
from qgraph.runtime.regions.cuda.pushed import SUM, SumNorm, can_push
from qgraph.runtime.regions.cuda.region import KERNEL
from qgraph.target import Target, as_target

from .form_regions import region_of

_NAME = "fuse-sums"


@dataclass(frozen=True)
class FuseSums:
    """See the module."""

    target: Target | None = None
    name: str = _NAME
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        target = as_target(self.target)
        mesh = target.mesh
        if target.backend != "cuda" or mesh is None or not may_connect(mesh):
            return graph
        return _fused(graph, mesh.size)


def _fused(graph: Graph, ranks: int) -> Graph:
    sums = (n for n in graph.nodes if n.op == SUM and can_push(n.output.type, ranks))
    found = [each for n in sums if (each := SumNorm.at(graph, n)) is not None]
    if not found and not any(node.bodies for node in graph.nodes):
        return graph
    adds = {each.nodes[1]: each for each in found}
    gone = {node for each in found for node in (each.nodes[0], each.nodes[2])}
    replace: dict[Value, Value] = {}
    done: dict[Node, None] = {}
    for node in graph.nodes:
        if node in gone or node in done:
            continue
        if (each := adds.get(node)) is not None:
            if each.weight.node.op != "input":
                done[each.weight.node] = None
            done[region_of(graph, each.nodes, replace, _NAME, KERNEL)] = None
            why = "it is pushed to the other rank, and added and normed as it comes"
            record(Entry.of(each.nodes[0], _NAME, "fused", why, 1))
            continue
        new = node.with_inputs(replace)
        if new.op != REGION:
            new = with_bodies(new, lambda body: _fused(body, ranks))
        done[new] = None
        replace.update((a, b) for a, b in zip(node.outputs, new.outputs, strict=True) if a is not b)
    if not found and all(a is b for a, b in zip(graph.nodes, done, strict=True)):
        return graph
    return graph.replace(nodes=list(done), outputs=[replace.get(v, v) for v in graph.outputs])
