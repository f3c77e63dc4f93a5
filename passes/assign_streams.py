"""Spread products over the streams of the target, and keep to the devices users asked for.

On CPUs MLX has one thread a stream, so as many streams as there are cores share the work.

Assigns:
    1. products that do not depend on one another to different streams, where that balances.
    2. else each quantized product in shards: rows of the weight, which `hoist-quantize` then slices
       once, in the pack step; the results are concatenated.  Exact: each output is one row's sum.
Leaves alone:
    1. nodes with a stream or device of their own.
    2. GPUs: several streams were measured slower than one there.
    3. products too small to be worth handing over.
    4. element-wise ops: they stay on the default stream, as `mx.compile` fuses only within one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qgraph.ir.graph import Graph, Node, Value
from qgraph.ir.ops import setting
from qgraph.rewrite.ledger import Entry, record
from qgraph.rewrite.rewriter import Visit, rewrite
from qgraph.target import Target, as_target
from qgraph.tracing.tensor import Tensor, apply

from .shared.products import PARTS

_NAME = "assign-streams"
_PRODUCTS = frozenset({"matmul", "addmm", "quantized_matmul", "gather_mm", "gather_qmm"})
_BALANCED = 1.1
"""Load of the busiest stream over the average, up to which whole products are as good as shards."""


@dataclass(frozen=True)
class AssignStreams:
    """See the module.

    Args:
        target: device and number of cores.
        min_flops: work below which another stream costs more than it gives.  Waking the thread of
            a stream took some 75 microseconds, there and back again 150, in which one core does
            half a million multiplications and additions of a quantized product.
    """

    target: Target | None = None
    min_flops: float = 5e5
    name: str = _NAME
    contract: str = "exact"

    def __call__(self, graph: Graph) -> Graph:
        target = as_target(self.target)
        if not target.is_cpu or target.cores < 2:
            return graph
        return rewrite(graph, lambda inner: self._visitor(inner, target.cores), self.name)

    def _visitor(self, graph: Graph, cores: int) -> Visit:
        whole, sharded = _schedule(graph, cores, self.min_flops)

        def visit(node: Node, old: Node) -> Sequence[Value] | None:
            if old in sharded:
                return _shards(node, cores)
            stream = whole.get(old)
            return None if stream is None else node.replace(stream=stream).outputs

        return visit


def flops(node: Node) -> float:
    """Multiplications and additions of a product."""
    if node.op not in _PRODUCTS:
        return 0.0
    x = node.args.get("x") or node.args.get("a")
    assert isinstance(x, Value)
    return 2.0 * node.output.type.size * x.type.shape[-1]


def _schedule(graph: Graph, cores: int, min_flops: float) -> tuple[dict[Node, int], set[Node]]:
    """Streams for whole products, and the products to shard.

    Products with the same number of costly products before them do not depend on one another.
    """
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
    whole: dict[Node, int] = {}
    sharded: set[Node] = set()
    for nodes in generations.values():
        streams, load = _spread(nodes, cores)
        if max(load) <= _BALANCED * sum(load) / cores:
            whole.update(streams)
            continue
        shardable = {node for node in nodes if _can_shard(node, cores)}
        sharded |= shardable
        rest = [node for node in nodes if node not in shardable]
        whole.update(_spread(rest, cores)[0] if len(rest) > 1 else {})
    return {node: stream for node, stream in whole.items() if stream}, sharded


def _spread(nodes: Sequence[Node], cores: int) -> tuple[dict[Node, int], list[float]]:
    """Streams for whole products, the costliest first to the stream with the least to do."""
    load = [0.0] * cores
    streams = {}
    for node in sorted(nodes, key=lambda n: (-flops(n), n.serial)):
        streams[node] = load.index(min(load))
        load[streams[node]] += flops(node)
    return streams, load


def _can_shard(node: Node, cores: int) -> bool:
    plain = node.op == "quantized_matmul" and setting(node, "transpose") and not node.kernel
    return bool(plain) and node.operand("w").ndim == 2 and node.output.shape[-1] >= 8 * cores


def _shards(node: Node, cores: int) -> list[Value]:
    """The product in `cores` parts, each with its rows of the weight and its stream."""
    rows = node.output.shape[-1]
    # Whole blocks of 8 rows: kernels take them fastest.
    ends = [8 * (rows // 8 * i // cores) for i in range(cores)] + [rows]
    results = []
    for stream in range(cores):
        part = slice(ends[stream], ends[stream + 1])
        args = dict(node.args)
        for name in PARTS:
            value = node.value(name)
            if value is not None:
                args[name] = apply("getitem", (Tensor(value), part)).value
        x = node.operand("x")
        types = [type(x.type)((*x.shape[:-1], part.stop - part.start), node.output.dtype)]
        shard = node.replace(args=args, types=types, stream=stream or None)
        results.append(Tensor(shard.output))
    reason, about = f"in {cores} shards, a stream each", f"with {rows} rows"
    record(Entry.of(node, _NAME, "chosen", reason, types=(), about=about))
    joined: Tensor = apply("concatenate", (results, node.output.ndim - 1))
    return [joined.value]
