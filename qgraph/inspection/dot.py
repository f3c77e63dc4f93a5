"""Graphs as DOT, which Graphviz draws: `dot -Tsvg graph.dot -o graph.svg`.

A loop's body is a box of its own: operands lead into its inputs, and what it yields leads to the
loop's node below it, which holds the results.  Colours tell streams apart.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..ir.graph import Graph, Node, Value, is_scalar
from ..ir.loops import body_entries, body_inputs
from .names import Names
from .text import STAGES, call_text, trip_count

_STREAMS = ("#e8eef7", "#fdebd3", "#e3f3e1", "#f6e2ee", "#fbf6cf", "#e0f2f1")
_HEAD = """  rankdir=TB; ranksep=0.35; nodesep=0.25; fontname="Helvetica"; fontsize=11;
  node [shape=box, style="rounded,filled", fillcolor="#e8eef7", color="#5b6b83",
        fontname="Helvetica", fontsize=10, margin="0.12,0.06"];
  edge [color="#5b6b83", arrowsize=0.6];"""


def to_dot(graph: Graph) -> str:
    """The graph in the DOT language; the same graph gives the same text.

    Labels hold op, names and types of the results, kernel and stream; tooltips the whole call and
    the user's line.  Numbers are part of the call, not nodes; other constants are.

    >>> import qgraph as qg
    >>> print(to_dot(qg.trace(lambda x: qg.tanh(x), qg.spec((4,)), name="f")).splitlines()[0])
    digraph "f" {
    """
    lines = [f"digraph {_quoted(graph.name)} {{", _HEAD]
    lines += (f"  {line}" for line in _Writer(graph).lines())
    return "\n".join([*lines, "}"])


class _Writer:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.names = Names(graph)
        self.ids: dict[Node, str] = {}
        self.edges: list[str] = []

    def lines(self) -> Iterator[str]:
        for value in self.graph.inputs:
            yield self.pill(value, "#ffffff")
        for stage, title in STAGES.items():
            staged = [n for n in self.graph.nodes if n.stage == stage]
            if staged:
                yield from self.cluster(title, (line for n in staged for line in self.node(n)))
        for node in self.graph.nodes:
            if node.stage == "run":
                yield from self.node(node)
        yield from self.results("return", self.graph.outputs)
        yield from self.edges

    def id(self, node: Node) -> str:
        return self.ids.setdefault(node, f"n{len(self.ids)}")

    def node(self, node: Node) -> Iterator[str]:
        if node.op == "constant":
            if not is_scalar(node.output):
                yield self.pill(node.output, "#eeeeee")
            return
        for position, body in enumerate(node.bodies):
            title = f"{body.name} of {node.op}{trip_count(node, self.names)}"
            yield from self.cluster(title, self.body(node, position))
        taken = {source for entries in body_entries(node) for _, source in entries}
        for value in dict.fromkeys(node.inputs):
            if value not in taken:
                self.edge(value, node)
        yield self.box(node)

    def body(self, node: Node, position: int) -> Iterator[str]:
        body = node.bodies[position]
        shared = {value for value, _ in body_inputs(node)[position][1]}
        for value, source in body_entries(node)[position]:
            yield self.pill(value, "#ffffff")
            if source is not None:
                self.edge(source, value.node, "style=dashed" if value in shared else "")
        for inner in body.nodes:
            yield from self.node(inner)
        yield from self.results("yield", body.outputs, to=node)

    def results(
        self, word: str, values: tuple[Value, ...], to: Node | None = None
    ) -> Iterator[str]:
        name = f"r{len(self.edges)}_{word}"
        text = ", ".join(self.names[v] for v in values[:8]) + (", ..." if len(values) > 8 else "")
        yield f"{name} [label={_quoted(f'{word} {text}'.rstrip())}, shape=plain, style=solid];"
        for value in dict.fromkeys(values):
            if not is_scalar(value):
                self.edges.append(f"{self.id(value.node)} -> {name};")
        if to is not None:
            self.edges.append(f"{name} -> {self.id(to)};")

    def cluster(self, title: str, lines: Iterator[str]) -> Iterator[str]:
        yield f"subgraph cluster_{len(self.ids)} {{"
        yield f'  label={_quoted(title)}; style="rounded"; color="#9aa6b8";'
        yield from (f"  {line}" for line in lines)
        yield "}"

    def edge(self, value: Value, reader: Node, style: str = "") -> None:
        if not is_scalar(value):
            attrs = f" [{style}]" if style else ""
            self.edges.append(f"{self.id(value.node)} -> {self.id(reader)}{attrs};")

    def pill(self, value: Value, colour: str) -> str:
        label = f"{self.names[value]}\n{value.type}"
        return (
            f"{self.id(value.node)} [label={_quoted(label)}, shape=box, "
            f'style="rounded,filled,dashed", fillcolor="{colour}"];'
        )

    def box(self, node: Node) -> str:
        results = [f"{self.names[v]}: {v.type}" for v in node.outputs[:4]]
        more = [f"... {len(node.outputs) - 4} more"] if len(node.outputs) > 4 else []
        choices = [f"kernel={node.kernel}"] if node.kernel else []
        choices += [f"stream={node.stream}"] if node.stream is not None else []
        label = "\n".join([node.op, *results, *more, *choices])
        call = call_text(node, self.names, limit=8)
        place = "  ".join(filter(None, [str(node.origin), node.origin.source()]))
        tip = "\n".join(filter(None, [call, place]))
        number = node.stream if isinstance(node.stream, int) else 0
        return (
            f"{self.id(node)} [label={_quoted(label)}, tooltip={_quoted(tip)}, "
            f'fillcolor="{_STREAMS[number % len(_STREAMS)]}"];'
        )


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
