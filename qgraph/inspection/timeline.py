"""The schedule of a plan as text: a line for each stream, and the critical path."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ..analysis.schedule import HOST, Bar, Durations, busiest, critical_path, loads, schedule
from ..ir.graph import Graph, Node
from ..target import Target


def timelines(graph: Graph, target: Target, width: int = 100) -> str:
    """Drawings of one call of a graph, and of one turn of the loops that take most of it.

    >>> import qgraph as qg
    >>> from qgraph.target import as_target
    >>> graph = qg.trace(lambda x: qg.exp(x) + 1, qg.spec((4,)), name="f")
    >>> print(timelines(graph, as_target("cpu"), width=40))
    f: one call, estimated 2 µs on cpu
      stream 0  [exp─────][add──────]  100 %
    critical path 2 µs: exp, add
    """
    durations = Durations(target)
    return "\n\n".join(
        _drawing(inner, "one call" if inner is graph else "one turn", durations, width)
        for inner in busiest(graph, durations)
    )


def _drawing(graph: Graph, what: str, durations: Durations, width: int) -> str:
    bars = schedule(graph, durations)
    end = max((bar.start + bar.seconds for bar in bars), default=0.0)
    lines = [f"{graph.name}: {what}, estimated {in_time(end)} on {durations.target.backend}"]
    names = {load.stream: _name(load.stream) for load in loads(bars)}
    widest = max((len(n) for n in names.values()), default=0)
    room = width - widest - 9
    for load in loads(bars):
        cells = _cells([bar for bar in bars if bar.stream == load.stream], end, room)
        lines.append(
            f"{names[load.stream]:{widest}}  {cells}  {load.seconds / end:4.0%}".replace("%", " %")
        )
    nodes, seconds = critical_path(graph, durations)
    lines.append(f"critical path {in_time(seconds)}: {path_text(nodes, durations)}")
    return "\n".join(lines)


def _name(stream: str) -> str:
    return f"  {stream}" if stream == HOST else f"  stream {stream}"


def _cells(bars: Sequence[Bar], end: float, room: int) -> str:
    cells = [" "] * room
    for i, bar in enumerate(bars):
        first = min(room - 1, round(bar.start / end * room))
        last = max(first + 1, round((bar.start + bar.seconds) / end * room))
        size = last - first
        label = bar.node.kernel or bar.node.op
        text = f"[{label[: size - 2]:─<{size - 2}}]" if size > 2 else "█▓"[i % 2] * size
        cells[first:last] = text
    return "".join(cells[:room]).rstrip().ljust(room)


def path_text(nodes: Sequence[Node], durations: Durations, most: int = 6) -> str:
    """The ops of a path that take time; of a long one, those that take most, with their counts."""
    timed = [node for node in nodes if durations.of(node) > 0]
    if len(timed) <= most:
        return ", ".join(node.kernel or node.op for node in timed)
    seconds: dict[str, float] = {}
    count: dict[str, int] = {}
    for node in timed:
        op = node.kernel or node.op
        seconds[op] = seconds.get(op, 0.0) + durations.of(node)
        count[op] = count.get(op, 0) + 1
    first = sorted(seconds, key=lambda op: -seconds[op])[:most]
    words = [f"{count[op]} × {op} {in_time(seconds[op])}" for op in first]
    return f"{len(timed)} nodes; " + ", ".join(words)


def schedule_table(graph: Graph, target: Target) -> Table:
    """Nodes and estimated time of each stream, and the critical path."""
    durations = Durations(target)
    table = Table(title=f"schedule, estimated for {target}", title_justify="left")
    for heading in ("of", "stream", "nodes", "works", "share"):
        table.add_column(heading, justify="left" if heading == "of" else "right")
    for inner in busiest(graph, durations):
        bars = schedule(inner, durations)
        end = max((bar.start + bar.seconds for bar in bars), default=0.0)
        what = f"{inner.name}, {in_time(end)}"
        for load in loads(bars):
            share = f"{load.seconds / end:.0%}".replace("%", " %")
            row = (load.stream, str(load.nodes), in_time(load.seconds), share)
            table.add_row(what, *row)
            what = ""
        nodes, seconds = critical_path(inner, durations)
        timed = sum(durations.of(node) > 0 for node in nodes)
        share = f"{seconds / end:.0%}".replace("%", " %") if end else ""
        table.add_row("  critical path", "", str(timed), in_time(seconds), share, end_section=True)
    return table


def in_time(seconds: float) -> str:
    """Seconds with a unit that suits them.

    >>> in_time(0.0000021), in_time(0.0123), in_time(3.5)
    ('2 µs', '12.3 ms', '3.50 s')
    """
    if seconds < 1e-3:
        return f"{1e6 * seconds:.0f} µs"
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
