"""Where a program's time goes: each node timed by itself, beside what it should take."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ..analysis.estimate import Cost, in_bytes
from ..ir.graph import Graph, Node
from ..target import Target
from .names import Names
from .text import call_text


@dataclass(frozen=True, slots=True)
class NodeTime:
    """A node's share of a call.

    Attributes:
        node: of the plan's graph or of a body in it.
        seconds: median of all its turns in one call, together.
        times: how often it runs in one call.
        cost: bytes and operations of all its turns, at least.
        estimate: seconds it should take: what the tables of kernels say of a product, for the
            rest its bytes at the speed of a copy.
    """

    node: Node
    seconds: float
    times: int
    cost: Cost
    estimate: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second that it moved."""
        return self.cost.nbytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class StretchTime:
    """A stretch that runs as one: compiled together, or a loop that the host drives."""

    label: str
    nodes: tuple[Node, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """A phase of a region that ran natively.

    Attributes:
        region: the node.
        nodes: what its steps carry out, a tuple for each.
        seconds: of all its turns in one call, median.
        nbytes: that its nodes move in all turns, at least.
    """

    region: Node
    nodes: tuple[tuple[Node, ...], ...]
    seconds: float
    nbytes: float

    @property
    def what(self) -> str:
        """Its steps, by the ops that they carry out."""
        steps = ["+".join(node.op for node in step) or "copy" for step in self.nodes]
        return " | ".join(dict.fromkeys(steps))


@dataclass(frozen=True)
class Profile:
    """What `Program.profile` measured; print it.

    Attributes:
        graph: the plan's graph.
        rows: its nodes, costliest first; views, which take no time, are left out.
        stretches: as they really run, compiled.
        seconds: median of a whole call.
        copy_bandwidth: bytes a second that a large copy reads and writes on this machine.
        phases: of regions that ran natively, in order.
    """

    graph: Graph
    target: Target
    rows: tuple[NodeTime, ...]
    stretches: tuple[StretchTime, ...]
    seconds: float
    copy_bandwidth: float
    phases: tuple[PhaseTime, ...] = ()

    @property
    def total(self) -> float:
        """Seconds of all nodes one by one."""
        return sum(row.seconds for row in self.rows)

    def share(self, row: NodeTime) -> float:
        """The part of `total` that a node takes, 0 to 1."""
        return row.seconds / self.total if self.total else 0.0

    def by_node(self) -> dict[Node, NodeTime]:
        return {row.node: row for row in self.rows}

    def notes(self) -> dict[Node, str]:
        """A word for each node, for `graph.format(notes=profile.notes())`."""
        return {r.node: f"{_time(r.seconds)} {self.share(r):.0%}" for r in self.rows}

    def format(self, *, top: int | None = None, width: int = 200) -> str:
        """Tables of stretches and nodes; `top` shows only so many of the costliest nodes."""
        names = Names(self.graph)
        head = (
            f"{self.graph.name} on {self.target}: a call takes {_time(self.seconds)}, its nodes "
            f"one by one {_time(self.total)}; a copy moves {self.copy_bandwidth / 1e9:.1f} GB/s"
        )
        parts = [head, _render(self._stretch_table(names), width)]
        if self.phases:
            parts.append(_render(self._phase_table(top), width))
        parts.append(_render(self._line_table(top), width))
        parts.append(_render(self._node_table(names, self.rows[:top]), width))
        left = len(self.rows) - len(self.rows[:top])
        if left:
            rest = sum(row.seconds for row in self.rows[top:])
            parts.append(f"{left} more nodes, {_time(rest)} together")
        return "\n".join(parts)

    def __str__(self) -> str:
        return self.format()

    def _stretch_table(self, names: Names) -> Table:
        table = _table("as it runs", ("stretch", "to", "nodes", "time"))
        for s in self.stretches:
            last = names[s.nodes[-1].outputs[-1]] if s.nodes else ""
            table.add_row(s.label, last, str(len(s.nodes)), _time(s.seconds))
        return table

    def by_phase(self) -> dict[str, list[PhaseTime]]:
        """Phases of regions by what they do, the costliest together first."""
        groups: dict[str, list[PhaseTime]] = {}
        for phase in self.phases:
            groups.setdefault(phase.what, []).append(phase)
        return dict(sorted(groups.items(), key=lambda item: -sum(p.seconds for p in item[1])))

    def _phase_table(self, top: int | None) -> Table:
        table = _table("phases of regions", ("does", "phases", "time", "bytes", "GB/s", "copy"))
        for what, phases in list(self.by_phase().items())[:top]:
            seconds, nbytes = sum(p.seconds for p in phases), sum(p.nbytes for p in phases)
            rate = nbytes / seconds if seconds else 0.0
            table.add_row(
                what if len(what) <= 64 else f"{what[:61]}...",
                str(len(phases)),
                _time(seconds),
                in_bytes(nbytes),
                f"{rate / 1e9:.1f}",
                f"{rate / self.copy_bandwidth:.0%}",
            )
        return table

    def by_line(self) -> dict[tuple[str, str], list[NodeTime]]:
        """Rows by the user's line and op, the costliest together first."""
        groups: dict[tuple[str, str], list[NodeTime]] = {}
        for row in self.rows:
            groups.setdefault((str(row.node.origin), row.node.op), []).append(row)
        return dict(sorted(groups.items(), key=lambda item: -sum(r.seconds for r in item[1])))

    def _line_table(self, top: int | None) -> Table:
        table = _table("by line and op", ("line", "op", "nodes", "time", "share"))
        for (line, op), rows in list(self.by_line().items())[:top]:
            seconds = sum(row.seconds for row in rows)
            share = sum(map(self.share, rows))
            table.add_row(line, op, str(len(rows)), _time(seconds), f"{share:.1%}")
        return table

    def _node_table(self, names: Names, rows: Sequence[NodeTime]) -> Table:
        headings = ("node", "line", "times", "time", "share", "estimate", "bytes", "GB/s", "copy")
        table = _table("node by node", headings)
        for row in rows:
            results = ", ".join(names[v] for v in row.node.outputs)
            text = f"{results} = {call_text(row.node, names)}"
            table.add_row(
                text if len(text) <= 48 else f"{text[:45]}...",
                str(row.node.origin),
                str(row.times),
                _time(row.seconds),
                f"{self.share(row):.1%}",
                _time(row.estimate),
                in_bytes(row.cost.nbytes),
                f"{row.bandwidth / 1e9:.1f}",
                f"{row.bandwidth / self.copy_bandwidth:.0%}",
            )
        return table


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        left = heading in ("node", "line", "op", "stretch", "to", "does")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    return table


def _render(table: Table, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table, markup=False)
    return console.export_text().rstrip()


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"
