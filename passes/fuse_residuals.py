"""On CUDA, a residual that is added and the norm of the sum become one launch.

With many rows each is a launch of its own, between products that are not in a region: the norm
would read all that the sum had just written, and a step of 16 rows is bound by its launches.

Rewrites (exact but for the order in which squares are added up):
    1. an `add` and the one `rms_norm` that reads it become one `region`. The sum stays a result
       where others read it.
Leaves alone:
    1. what is in a region of a few rows already.
    2. sums of other types than what is added, two norms of one sum, weights of another type.
    3. rows that do not fit in a block's threads, or are no whole 16 bytes.
    4. nodes with a stream of their own, what the pack and prepare steps compute, other targets.
    5. norms whose weight is computed after the sum.

Runs after regions are formed on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from qgraph.ir.graph import Graph, Node
from qgraph.runtime.regions.cuda.residual import AddNorm
from qgraph.target import Target, as_target

from .shared.launches import in_one_launch


@dataclass(frozen=True)
class FuseResiduals:
    """See the module."""

    target: Target | None = None
    name: str = "fuse-residuals"
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        if as_target(self.target).backend != "cuda":
            return graph
        why = "a residual and its norm are one launch, which reads the rows once"
        return in_one_launch(graph, _found, self.name, why)


def _found(graph: Graph, node: Node) -> AddNorm | None:
    found = AddNorm.at(graph, node)
    if found is None or any(n.stream is not None or n.stage != "run" for n in found.nodes):
        return None
    return found
