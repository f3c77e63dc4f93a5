"""On CUDA, an attention, products of few rows and what stands between them become one launch.

A decoding step is bound by launches and by what they wait for: a product, a norm, an activation are
each some microseconds in which the memory is idle.  A `region` of them is one kernel with a barrier
over the grid between its products, and the next weights are under way while it is waited for.

Rewrites:
    1. products whose weight is laid out in tiles, of up to eight rows, with RMS norms, splits and
       elementwise operations: those that wait for nothing else become one `region`, those that wait
       for others the next.
    2. an attention that stores its token in a tail begins a region, if its cache is short.
    3. what picks the greatest number of each row ends one.
    4. on a mesh of GPUs with a process each, sums over the ranks of what a product gives: a barrier
       of the region is then one of all ranks.  Where they reach no memory of each other, the body
       runs.
    5. experts: products whose matrices are chosen by what the region itself computes, with their
       router, if their results are added up.  What cannot be translated is launches of its own, and
       the rest is regions without it.
Leaves alone:
    1. what the pack and prepare steps compute.
    2. other ops, weights in other layouts, and more rows; the ledger names what a region ends at.
    3. stretches without a product, or of nothing but one.
    4. rows that do not fit in a block's shared memory: six of 14336 columns do not, five do.
    5. nodes with a stream of their own.
    6. heads as rows of their own: all rows of a region are those of its products.
    7. experts of more than 32 rows, which share matrices, or that come from elsewhere.
    8. other targets, and GPUs older than Hopper, for which weights are not laid out in tiles.

Runs after kernels are chosen, as it is their layout that it reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qgraph.ir.graph import Graph, Node, Value
from qgraph.rewrite.ledger import Entry, collecting, record
from qgraph.rewrite.rewriter import rewrite_each
from qgraph.runtime.regions.cuda.attention import OP as ATTENTION
from qgraph.runtime.regions.cuda.experts import OP as GATHER
from qgraph.runtime.regions.cuda.held import SUM, refusal, rows_of
from qgraph.runtime.regions.cuda.peers import may_connect
from qgraph.runtime.regions.cuda.pick import is_pick
from qgraph.runtime.regions.cuda.region import KERNEL, multiprocessors
from qgraph.runtime.regions.cuda.source import written
from qgraph.runtime.regions.cuda.translate import translate
from qgraph.runtime.regions.unknown import Unknown
from qgraph.target import Target, as_target
from qgraph.tracing.tensor import Tensor, apply

from .form_regions import formed, region_of
from .shared.routed import in_turn, of_experts
from .shared.views import is_plain

_NAME = "form-grid-regions"
_VIEWS = frozenset({"reshape", "split"})


@dataclass(frozen=True)
class FormGridRegions:
    """See the module."""

    target: Target | None = None
    name: str = _NAME
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        target = as_target(self.target)
        if target.backend != "cuda":
            return graph

        plain = rewrite_each(graph, _plain, _NAME)
        alone: frozenset[Node] = frozenset()
        while True:  # what stands around those that are left alone may still be regions
            made, entries, more = _formed(plain, target, alone)
            for entry in entries:
                if not more or entry.decision == "refused":
                    record(entry)
            if not more:
                break
            alone |= more
        return graph if made is plain else made


def _formed(
    graph: Graph, target: Target, alone: frozenset[Node]
) -> tuple[Graph, list[Entry], frozenset[Node]]:
    """The graph with its regions, what is told of them, and nodes for which there was none, though
    they had a place in one.

    Args:
        alone: nodes that have no place.
    """
    rows = {rows_of(n.output) for _, n in graph.walk() if n.op == "packed_matmul"}
    experts = frozenset[Node]().union(*(of_experts(g) for g in _graphs(graph))) - alone
    left: set[Node] = set()

    def refused(node: Node) -> str | None:
        if node in alone:
            return "it is a launch of its own"
        if node in experts:
            return None
        own = node.op == ATTENTION or is_pick(node)
        if not own and any(rows_of(v) not in rows for v in node.outputs if v.ndim):
            return "its rows are not those of products"
        if node.op == SUM and not may_connect(target.mesh):
            return "the ranks of this mesh share no memory"
        return refusal(node)

    def pays(graph: Graph, nodes: Sequence[Node]) -> bool:
        found = _pays(graph, nodes, target)
        if not found:
            routed = experts.intersection(nodes)
            left.update(routed or (node for node in nodes if node.op == ATTENTION))
        return found

    with collecting() as entries:
        made = formed(graph, refused, pays, _NAME, KERNEL, lambda node: node.op == ATTENTION)
    return made, entries, frozenset(left)


def _graphs(graph: Graph) -> Iterator[Graph]:
    """A graph and the bodies of its loops."""
    yield graph
    for node in graph.nodes:
        for body in node.bodies:
            yield from _graphs(body)


def _plain(node: Node) -> Sequence[Value] | None:
    """Views that leave all elements in order, in one word, and experts of each row in turn."""
    if node.op == GATHER:
        found = in_turn(node)
        return None if found is None else found.outputs
    return _reshaped(node)


def _reshaped(node: Node) -> Sequence[Value] | None:
    """Views that leave all elements in order, in one word."""
    if node.op == "reshape" or not is_plain(node):
        return None
    return [apply("reshape", (Tensor(node.inputs[0]), node.output.shape)).value]


def _pays(graph: Graph, nodes: Sequence[Node], target: Target) -> bool:
    """A launch is saved, and the back end can write the kernel."""
    if sum(node.op not in _VIEWS for node in nodes) < 2:
        return False
    if all(node.op != "packed_matmul" for node in nodes):
        return False
    (body,) = region_of(graph, nodes, {}, _NAME).bodies
    ranks = 1 if target.mesh is None else target.mesh.size
    try:
        written(translate(body), multiprocessors(), target.arch, ranks)
    except Unknown as error:
        record(Entry.of(nodes[0], _NAME, "refused", str(error), types=()))
        return False
    return True
