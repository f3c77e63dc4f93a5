"""When each node would run: estimates, laid out on the streams of the target.

A node starts when its stream is free and what it reads is there.  Products take what the tables
of kernels say, where they know them; the rest their bytes at the speed of a copy, and never less
than the launch of a node.  Loops are one bar of all their turns; a turn has a timeline of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..estimate import VIEWS, estimate
from ..interpret import turns
from ..ir import Graph, Node, Value
from ..ops import CONTROL_FLOW
from ..target import Target

COPY_BANDWIDTH = {"cpu": 20e9, "metal": 200e9, "cuda": 2000e9}
"""Bytes a second of a copy, assumed where no profile has measured it."""

LAUNCH = 1e-6


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
        if node.op in CONTROL_FLOW:
            bodies = [max((b.start + b.seconds for b in schedule(g, self)), default=0.0)
                      for g in node.bodies]  # fmt: skip
            return max(bodies) if node.op == "cond" else sum(bodies) * (turns(node) or 1)
        from ..measuring import product_estimate

        known = product_estimate(node, self.target)
        return max(LAUNCH, estimate(node).nbytes / self.bandwidth if known is None else known)


def schedule(graph: Graph, durations: Durations) -> list[Bar]:
    """The bars of one call of `graph`, or of one turn of a body; views take no time.

    >>> import qgraph as qg
    >>> from qgraph.target import as_target
    >>> graph = qg.trace(lambda x: qg.exp(x) + 1, qg.spec((4,)))
    >>> [bar.node.op for bar in schedule(graph, Durations(as_target("cpu")))]
    ['exp', 'add']
    """
    ready: dict[Value, float] = {}
    free: dict[str, float] = {}
    bars = []
    for node in graph.nodes:
        if node.op == "constant" or node.stage != "run":
            continue
        seconds = durations.of(node)
        stream = "0" if node.stream is None else str(node.stream)
        start = max((ready.get(v, 0.0) for v in node.inputs), default=0.0)
        if seconds > 0:
            start = max(start, free.get(stream, 0.0))
            free[stream] = start + seconds
            bars.append(Bar(node, stream, start, seconds))
        for value in node.outputs:
            ready[value] = start + seconds
    return bars
