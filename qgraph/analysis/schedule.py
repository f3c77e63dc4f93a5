"""When each node would run: estimates, laid out on the streams of the target.

A node starts when its stream is free and what it reads is there; from one stream of a CPU to
another that takes the waking of a thread.  Products take what the tables of kernels say, where they
know them; the rest their bytes at the speed of a copy, and never less than the launch of a node.
Loops are one bar of all their turns; a turn has a timeline of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.graph import Graph, Node, Value
from ..ir.kinds import VIEWS
from ..ir.loops import HOLDERS, turns
from ..ir.ops import OPS
from ..kernels.chosen import runs_on_host
from ..target import Target
from .estimate import estimate
from .meshes import is_collective
from .problems import product_estimate

COPY_BANDWIDTH = {"cpu": 20e9, "metal": 200e9, "cuda": 2000e9}
"""Bytes a second of a copy, assumed where no profile has measured it."""

HOST = "host"
"""In place of a stream: products that Python calls, each on all cores."""

LAUNCH = 1e-6
HAND_OVER = 75e-6
"""Until the thread of another CPU stream goes on, measured; see `assign-streams`."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A node on its stream; times in seconds from the start."""

    node: Node
    stream: str
    start: float
    seconds: float


class Durations:
    """Seconds that nodes should take, or were measured to.

    Args:
        target: what the graph was optimized for.
        measured: seconds of all turns of a node in one call, and how often it runs.
        bandwidth: bytes a second of a copy.
    """

    def __init__(
        self,
        target: Target,
        measured: Mapping[Node, tuple[float, int]] | None = None,
        bandwidth: float | None = None,
    ) -> None:
        self.target = target
        self.measured = measured or {}
        self.bandwidth = bandwidth or COPY_BANDWIDTH.get(target.backend, 20e9)
        self._known: dict[Node, float] = {}

    def of(self, node: Node) -> float:
        """Seconds of one run of a node; of a loop, of all its turns."""
        if node not in self._known:
            self._known[node] = self._seconds(node)
        return self._known[node]

    def _seconds(self, node: Node) -> float:
        if node in self.measured:
            seconds, times = self.measured[node]
            return seconds / max(times, 1)
        if node.op in VIEWS:
            return 0.0
        if node.op in HOLDERS:
            bodies = [max((b.start + b.seconds for b in schedule(g, self)), default=0.0)
                      for g in node.bodies]  # fmt: skip
            if node.op == "cond":
                return max(bodies)
            count = turns(node)
            return sum(bodies) * (1 if count is None else count)
        if is_collective(node) and self.target.mesh is not None:
            name = node.op.partition(".")[2]
            size = max(v.type.nbytes for v in (*node.inputs, *node.outputs))
            rows = node.output.type.rows if node.inputs and _is_product(node.inputs[0]) else None
            return self.target.mesh.seconds(name, size, rows)
        known = product_estimate(node, self.target)
        return max(LAUNCH, estimate(node).nbytes / self.bandwidth if known is None else known)


def _is_product(value: Value) -> bool:
    return value.node.op in OPS and OPS[value.node.op].kind in ("product", "chosen kernels")


def schedule(graph: Graph, durations: Durations) -> list[Bar]:
    """The bars of one call of `graph`, or of one turn of a body; views take no time.

    >>> import qgraph as qg
    >>> from qgraph.target import as_target
    >>> graph = qg.trace(lambda x: qg.exp(x) + 1, qg.spec((4,)))
    >>> [bar.node.op for bar in schedule(graph, Durations(as_target("cpu")))]
    ['exp', 'add']
    """
    ready: dict[Value, float] = {}
    made_on: dict[Value, str] = {}
    free: dict[str, float] = {}
    bars = []
    hand_over = HAND_OVER if durations.target.is_cpu else 0.0
    for node in graph.nodes:
        if node.op == "constant" or node.stage != "run":
            continue
        seconds = durations.of(node)
        stream = _stream(node)
        start = max(
            (
                ready[v] + (hand_over if seconds > 0 and made_on[v] != stream else 0.0)
                for v in node.inputs
                if v in ready
            ),
            default=0.0,
        )
        if seconds > 0:
            start = max(start, free.get(stream, 0.0))
            free[stream] = start + seconds
            bars.append(Bar(node, stream, start, seconds))
        for value in node.outputs:
            ready[value] = start + seconds
            made_on[value] = stream if seconds > 0 else _stream_of_view(node, made_on, stream)
    return bars


def _stream(node: Node) -> str:
    if runs_on_host(node.op, node.args):
        return HOST
    return "0" if node.stream is None else str(node.stream)


def _stream_of_view(node: Node, made_on: Mapping[Value, str], stream: str) -> str:
    return next((made_on[v] for v in node.inputs if v in made_on), stream)


@dataclass(frozen=True)
class Load:
    """What a stream has to do in one call.

    Attributes:
        seconds: that it works, estimated.
        nodes: how many it runs.
    """

    stream: str
    seconds: float
    nodes: int


def loads(bars: Sequence[Bar]) -> list[Load]:
    """The load of each stream, by name."""
    by_stream: dict[str, list[Bar]] = {}
    for bar in bars:
        by_stream.setdefault(bar.stream, []).append(bar)
    return [
        Load(stream, sum(bar.seconds for bar in some), len(some))
        for stream, some in sorted(by_stream.items())
    ]


def critical_path(graph: Graph, durations: Durations) -> tuple[list[Node], float]:
    """The nodes that no number of streams would let run sooner, and their seconds together.

    >>> import qgraph as qg
    >>> from qgraph.target import as_target
    >>> graph = qg.trace(lambda x: (qg.exp(qg.sin(x)), qg.cos(x)), qg.spec((4,)))
    >>> [node.op for node in critical_path(graph, Durations(as_target("cpu")))[0]]
    ['sin', 'exp']
    """
    import networkx as nx

    path: nx.DiGraph[Any] = nx.DiGraph()
    for node in graph.nodes:
        if node.op != "constant" and node.stage == "run":
            path.add_edge((node, "starts"), (node, "ends"), weight=durations.of(node))
            path.add_edges_from(((v.node, "ends"), (node, "starts")) for v in node.inputs)
    longest = nx.dag_longest_path(path, default_weight=0)
    nodes = [node for node, end in longest if end == "starts"]
    return nodes, sum(durations.of(node) for node in nodes)


def busiest(graph: Graph, durations: Durations) -> list[Graph]:
    """The graph, and bodies within it in which most of the time of what holds them passes."""
    found = [graph]
    while True:
        inner = [n for n in found[-1].nodes if n.bodies and n.stage == "run"]
        whole = sum(
            durations.of(n) for n in found[-1].nodes if n.stage == "run" and n.op != "constant"
        )
        node = max(inner, key=durations.of, default=None)
        if node is None or durations.of(node) < whole / 2:
            return found
        found.append(max(node.bodies, key=Graph.count))
