"""The costly things of a graph as it is written, with an estimate of what they cost.

A finding is what the passes would mend, or what they cannot: both are worth a look in the source.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..analysis.changes import (
    CALLS,
    HELD,
    NEVER,
    PARAMETERS,
    Change,
    behind_views,
    changes,
    readers,
)
from ..ir.graph import Graph, Node, Value
from ..ir.kinds import PRODUCTS
from ..ir.loops import LOOPS, turns
from ..origin import Origin
from ..rewrite.ledger import Entry

MANY = 1000
"""Turns assumed of a loop whose count only the run can tell."""

LOOKUPS = frozenset({"take", "getitem"})


@dataclass(frozen=True, slots=True)
class Finding:
    """One costly node.

    Attributes:
        what: the finding in words.
        op: of the node.
        origin: the user's line.
        times: how often it runs in one call; a bound where a count is known at run time only.
        bytes: that it reads and writes in one call, all its times together.
        guessed: the number of times is assumed: only the run can tell.
        becomes: what `optimize` makes of it; empty where that was not asked for.
    """

    what: str
    op: str
    origin: Origin
    times: int
    bytes: int
    guessed: bool = False
    becomes: str = ""

    def __str__(self) -> str:
        often = "once a call" if self.times == 1 else f"{self.times} times"
        often += " if its loops turn so often" if self.guessed else ""
        becomes = f"; {self.becomes}" if self.becomes else ""
        return f"{self.what}, {self.origin}: {often}, {self.bytes / 2**20:.1f} MiB{becomes}"


def lint(graph: Graph) -> list[Finding]:
    """Quantizes that need not run so often, and packed weights that are made dense.

    The costliest come first; alike ones of one line are counted together.

    >>> import mlx.core as mx, qgraph as qg
    >>> w = mx.ones((64, 64))
    >>> step = lambda i, h: qg.quantized_matmul(h, w)
    >>> graph = qg.trace(lambda x: qg.fori_loop(0, 64, step, x), qg.spec((1, 64)))
    >>> lint(graph)[0].times
    64
    """
    found: dict[tuple[str, Origin, bool], Finding] = {}
    for finding in _findings(graph, changes(graph), 1, False):
        key = (finding.what, finding.origin, finding.guessed)
        if (known := found.get(key)) is not None:
            times, moved = known.times + finding.times, known.bytes + finding.bytes
            finding = replace(finding, times=times, bytes=moved)
        found[key] = finding
    return sorted(found.values(), key=lambda finding: -finding.bytes)


def explained(findings: list[Finding], ledger: list[Entry]) -> list[Finding]:
    """The findings with what a plan's ledger says became of each."""
    said: dict[tuple[Origin, str], Entry] = {}
    for entry in ledger:
        said[entry.origin, entry.op] = entry
    result = []
    for finding in findings:
        what = said.get((finding.origin, finding.op))
        because = f", {what.reason}" if what and what.reason else ""
        becomes = f"{what.decision} by optimize{because}" if what else ""
        result.append(replace(finding, becomes=becomes))
    return result


def _findings(
    graph: Graph, known: dict[Value, Change], times: int, guessed: bool
) -> Iterator[Finding]:
    for node in graph.nodes:
        what = ""
        if node.op == "quantize":
            what = _quantizes(known[node.operand("w")], times)
        elif node.op == "dequantize":
            what = _makes_dense(graph, node, known)
        if what:
            inside = " inside a loop" if times > 1 else ""
            moved = sum(v.type.nbytes for v in (*node.inputs, *node.outputs))
            text = f"{node.op} of {what}{inside}"
            yield Finding(text, node.op, node.origin, times, times * moved, guessed)
        for body in node.bodies:
            count = turns(node) if node.op in LOOPS else 1
            inner = times * (MANY if count is None else count)
            yield from _findings(body, known, inner, guessed or count is None)


def _quantizes(change: Change, times: int) -> str:
    """What a `quantize` quantizes, if that is more often than it must; else nothing."""
    if change.level == NEVER:
        return "a constant"
    if change.level == PARAMETERS:
        return "a parameter"
    if times == 1 or change.level == HELD:
        return "a constant" if change.level == HELD else ""
    return "an argument" if change.level == CALLS else "a value that changes with each turn"


def _makes_dense(graph: Graph, node: Node, known: dict[Value, Change]) -> str:
    """How a `dequantize` is used, if a packed form would do; else nothing."""
    made = behind_views(node.operand("w")).node
    if made.op == "quantize" and known[made.operand("w")].level in range(CALLS, HELD):
        return ""  # an activation is rounded
    ops = {reader.op for reader in readers(graph, node.output)}
    if ops & PRODUCTS:
        return "a weight, dense, for a product"
    rows = any(
        reader.output.type.size < node.output.type.size
        for reader in readers(graph, node.output)
        if reader.op in LOOKUPS
    )
    return "a whole weight for a part of it" if rows else ""
