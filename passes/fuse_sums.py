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

from qgraph.ir.graph import Graph, Node
from qgraph.runtime.regions.cuda.peers import may_connect
from qgraph.runtime.regions.cuda.pushed import SUM, can_push, sum_norm
from qgraph.runtime.regions.cuda.residual import AddNorm
from qgraph.target import Target, as_target

from .shared.launches import in_one_launch


@dataclass(frozen=True)
class FuseSums:
    """See the module."""

    target: Target | None = None
    name: str = "fuse-sums"
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        target = as_target(self.target)
        mesh = target.mesh
        if target.backend != "cuda" or mesh is None or not may_connect(mesh):
            return graph

        def found(graph: Graph, node: Node) -> AddNorm | None:
            if node.op != SUM or not can_push(node.output.type, mesh.size):
                return None
            return sum_norm(graph, node)

        why = "it is pushed to the other rank, and added and normed as it comes"
        return in_one_launch(graph, found, self.name, why)
