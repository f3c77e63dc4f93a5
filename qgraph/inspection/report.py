"""Tables of a plan as text: its passes, the weights it packs, its schedule."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ..ir.graph import Graph
from ..rewrite.history import History, PlanStep
from ..rewrite.ledger import LOWERING, Entry
from .timeline import schedule_table

_WORDS = ("pass", "what changed")


@dataclass(frozen=True)
class PackedWeight:
    """What packing makes of one weight."""

    name: str
    float_bytes: int
    packed_bytes: int
    bits: int


def packed_weights(graph: Graph) -> list[PackedWeight]:
    """The weights that the pack and prepare steps of a graph quantize."""
    found = []
    for node in graph.nodes:
        if node.op == "quantize" and node.stage != "run":
            source = node.operand("w")
            packed = sum(v.type.nbytes for v in node.outputs)
            name = str(source.node.args.get("name", "")) or source.node.op
            found.append(PackedWeight(name, source.type.nbytes, packed, node.args["bits"]))
    return found


def report(history: History, ledger: Sequence[Entry], width: int = 100) -> str:
    """The tables of a plan, and what its ledger says could not be done: weights that were not
    quantized, regions that run by their bodies."""
    graph = history.graph
    tables = [_pass_table(history.steps, str(history.target))]
    if weights := packed_weights(graph):
        tables.append(_weight_table(weights))
    if any(node.stage == "run" and node.op != "constant" for node in graph.nodes):
        tables.append(schedule_table(graph, history.target))
    left = [e for e in ledger if e.made_by == "quantize-weights"]
    lines = [f"not quantized: {e.what}: {e.reason}" for e in left if e.decision == "refused"]
    lines += [f"{e.op} at {e.origin}: {e.reason}" for e in ledger if e.made_by == LOWERING]
    return "\n".join([*(_render(table, width) for table in tables), *lines])


def _pass_table(steps: Sequence[PlanStep], target: str) -> Table:
    table = Table(title=f"passes for {target}", title_justify="left")
    for heading in ("pass", "before", "after", "what changed", "ms"):
        table.add_column(heading, justify="left" if heading in _WORDS else "right")
    for step in steps:
        counts = str(step.before.count()), str(step.after.count())
        table.add_row(step.name, *counts, step.summary(), f"{step.milliseconds:.1f}")
    return table


def _weight_table(weights: Sequence[PackedWeight]) -> Table:
    table = Table(title="weights packed", title_justify="left")
    for heading in ("weight", "float bytes", "packed bytes", "bits"):
        table.add_column(heading, justify="left" if heading == "weight" else "right")
    for w in weights:
        table.add_row(w.name, f"{w.float_bytes:,}", f"{w.packed_bytes:,}", str(w.bits))
    total = (sum(w.float_bytes for w in weights), sum(w.packed_bytes for w in weights))
    table.add_row(
        "all", f"{total[0]:,}", f"{total[1]:,}", f"{total[0] / total[1]:.1f}x smaller", style="bold"
    )
    return table


def _render(table: Table, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text().rstrip()
