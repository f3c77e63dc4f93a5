"""The costly things of a graph as it is written, with an estimate of what they cost.

A finding is what the passes would mend, or what they cannot: both are worth a look in the source.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .interpret import turns
from .ir import Graph, Node, Value
from .ledger import PRODUCTS
from .names import body_inputs
from .ops import LOOPS
from .origin import Origin

MANY = 1000
"""Turns assumed of a loop whose count only the run can tell."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One costly node.

    Attributes:
        what: the finding in words.
        origin: the user's line.
        times: how often it runs in one call; a bound where a count is known at run time only.
        bytes: that it reads and writes in one call, all its times together.
    """

    what: str
    origin: Origin
    times: int
    bytes: int

    def __str__(self) -> str:
        often = "once a call" if self.times == 1 else f"{self.times} times"
        return f"{self.what}, {self.origin}: {often}, {self.bytes / 2**20:.1f} MiB"


def lint(graph: Graph) -> list[Finding]:
    """Quantizes of what does not change, and products with a dense copy of a packed weight.

    >>> import mlx.core as mx, qgraph as qg
    >>> w = mx.ones((64, 64))
    >>> step = lambda i, h: qg.quantized_matmul(h, w)
    >>> graph = qg.trace(lambda x: qg.fori_loop(0, 64, step, x), qg.spec((1, 64)))
    >>> lint(graph)[0].times
    64
    """
    findings = list(_findings(graph, 1, {v: False for v in graph.inputs}))
    return sorted(findings, key=lambda f: -f.bytes)


def _findings(graph: Graph, times: int, fixed: dict[Value, bool]) -> Iterator[Finding]:
    """`fixed` says of each value whether it is the same at every turn and call."""
    for node in graph.nodes:
        same = node.op == "constant" or (
            bool(node.inputs) and not node.bodies and all(fixed[v] for v in node.inputs)
        )
        fixed.update(dict.fromkeys(node.outputs, same))
        if node.op == "quantize":
            if same or times > 1:
                yield _finding(node, times, "a constant" if same else "a value")
        elif node.op == "dequantize":
            readers = [r.op for r in graph.users.get(node.output, ())]
            if any(op in PRODUCTS or op in ("transpose", "swapaxes") for op in readers):
                yield _finding(node, times, "a weight, dense, for a product")
        for body, (own, shared) in zip(node.bodies, body_inputs(node), strict=True):
            inner = times * (_turns(node) if node.op in LOOPS else 1)
            known = dict.fromkeys(own, False)
            known.update((v, fixed[source]) for v, source in shared)
            yield from _findings(body, inner, known)


def _turns(node: Node) -> int:
    count = turns(node)
    return MANY if count is None else count


def _finding(node: Node, times: int, of: str) -> Finding:
    inside = " inside a loop" if times > 1 else ""
    moved = sum(v.type.nbytes for v in (*node.inputs, *node.outputs))
    return Finding(f"{node.op} of {of}{inside}", node.origin, times, times * moved)
