"""Give independent work to the streams of the target, and keep to the devices users asked for.

Assigns:
    1. on CPUs, where MLX has one thread a stream: products of one generation (which do not depend
       on one another) to different streams, the costly ones first, if they are worth a
       synchronisation.
Leaves alone:
    1. nodes with a stream or device of their own.
    2. GPUs: several streams were measured slower than one there.
    3. element-wise ops: they stay on the default stream, as `mx.compile` fuses only within one.
    4. graphs in which no two products worth it are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qgraph.ir import Graph, Node, Value
from qgraph.rewrite import Visit, rewrite
from qgraph.target import Target, as_target

_PRODUCTS = frozenset({"matmul", "addmm", "quantized_matmul", "gather_mm", "gather_qmm"})


@dataclass(frozen=True)
class AssignStreams:
    """See the module.

    Args:
        target: device and number of cores.
        min_flops: work below which another stream costs more than it gives (a hand-over between
            CPU streams takes some 20 microseconds).
    """

    target: Target | None = None
    min_flops: float = 4e5
    name: str = "assign-streams"
    contract: str = "exact"

    def __call__(self, graph: Graph) -> Graph:
        target = self.target or as_target()
        if not target.is_cpu or target.cores < 2:
            return graph
        return rewrite(graph, lambda inner: self._visitor(inner, target.cores), self.name)

    def _visitor(self, graph: Graph, cores: int) -> Visit:
        chosen = _by_generation(graph, cores, self.min_flops)
        places = iter(graph.nodes)

        def visit(node: Node) -> Sequence[Value] | None:
            stream = chosen.get(next(places))
            return None if stream is None else node.replace(stream=stream).outputs

        return visit


def flops(node: Node) -> float:
    """Multiplications and additions of a product."""
    if node.op not in _PRODUCTS:
        return 0.0
    x = node.args.get("x") or node.args.get("a")
    assert isinstance(x, Value)
    return 2.0 * node.output.type.size * x.type.shape[-1]


def _by_generation(graph: Graph, cores: int, min_flops: float) -> dict[Node, int]:
    """Streams for products with the same number of costly products before them."""
    before: dict[Value, int] = {}
    generations: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "constant" or node.stage != "run":
            continue
        depth = max((before.get(v, 0) for v in node.inputs), default=0)
        if flops(node) >= min_flops and node.stream is None:
            generations.setdefault(depth, []).append(node)
            depth += 1
        before.update(dict.fromkeys(node.outputs, depth))
    chosen: dict[Node, int] = {}
    for nodes in generations.values():
        load = [0.0] * cores
        if len(nodes) < 2:
            continue
        for node in sorted(nodes, key=lambda n: (-flops(n), n.serial)):
            stream = load.index(min(load))
            load[stream] += flops(node)
            if stream:
                chosen[node] = stream
    return chosen
