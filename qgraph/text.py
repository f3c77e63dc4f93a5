"""Graphs as text: what `print(graph)` shows."""

from __future__ import annotations

import builtins
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.text import Text

from .estimate import VIEWS, estimate, total
from .fold import repeats
from .ir import Graph, Node, Value
from .names import Names, body_inputs
from .ops import OPS
from .select import Selection
from .types import SHORT_NAMES

_INDEXED = {"getitem"} | {name for name in OPS if name.startswith("at_")}
_MARGIN = 88
"""Origins stand in one column, no further right than this unless a line is longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format(Selection):
    """What to show, and which nodes (the fields of `Selection`).

    Attributes:
        origins: the user's line beside each node.
        choices: kernel and stream, where a pass chose them.
        costs: at least how many bytes each node moves and how many operations it does.
        fold: repeated layers once, with their number.
        colour: ANSI colours for terminals.
        notes: a word beside a node, such as `Profile.notes()` gives.
    """

    origins: bool = True
    choices: bool = True
    costs: bool = False
    fold: bool = False
    colour: bool = False
    notes: Mapping[Node, str] = field(default_factory=dict)


@dataclass(slots=True)
class Line:
    indent: int
    text: str
    origin: str = ""
    choices: str = ""
    node: Node | None = None
    cost: str = ""


def format_graph(graph: Graph, options: Format | None = None) -> str:
    """The text of `graph`, the same from run to run."""
    options = options or Format()
    names = Names(graph)
    lines = graph_lines(graph, names, fold=options.fold, costs=options.costs)
    chosen = options.nodes(graph, names)
    if chosen is not None:
        lines = _only(lines, chosen)
    text = "\n".join(_in_columns(lines, options))
    return coloured(text) if options.colour else text


def _in_columns(lines: Sequence[Line], options: Format) -> Iterator[str]:
    """Origins in one column, choices and costs after them."""
    notes = [
        [
            line.origin if options.origins else "",
            line.choices if options.choices else "",
            line.cost,
            options.notes.get(line.node, "") if line.node is not None else "",
        ]
        for line in lines
    ]
    lengths = [len(x.text) + x.indent for x, n in zip(lines, notes, strict=True) if any(n)]
    column = max((n for n in lengths if n <= _MARGIN), default=0) + 2
    width = max((len(n[0]) for n in notes if any(n[1:])), default=0)
    for line, (origin, *rest) in zip(lines, notes, strict=True):
        text = " " * line.indent + line.text
        right = "  ".join(filter(None, rest))
        if right:
            origin = f"{origin.ljust(width)}  {right}" if width else right
        yield f"{text.ljust(column - 2)}  {origin}" if origin else text


def _only(lines: Sequence[Line], chosen: set[Node]) -> list[Line]:
    """The lines of chosen nodes, with the heads of what they stand in; gaps are counted."""
    kept: set[int] = set()
    heads: list[int] = []
    for i, line in enumerate(lines):
        while heads and lines[heads[-1]].indent >= line.indent:
            heads.pop()
        if line.node in chosen and line.node is not None:
            kept |= {i, *heads}
        heads.append(i)
    result: list[Line] = []
    skipped = 0
    for i, line in enumerate(lines):
        if i in kept or line.indent == 0:
            if skipped:
                result.append(Line(line.indent or 2, f"... {skipped} not shown"))
            result.append(line)
            skipped = 0
        elif line.node is not None:
            skipped += 1
    if skipped:
        result.append(Line(2, f"... {skipped} not shown"))
    return result


def coloured(text: str) -> str:
    """The text of a graph with ANSI colours."""
    console = Console(
        file=io.StringIO(), force_terminal=True, color_system="standard", width=10**6,
        highlight=False, no_color=False,
    )  # fmt: skip
    result = Text(text)
    for pattern, style in _COLOURS:
        result.highlight_regex(pattern, style)
    console.print(result, soft_wrap=True, end="")
    shown = console.file
    assert isinstance(shown, io.StringIO)
    return shown.getvalue()


_COLOURS = [
    (r"(?m)^ *(graph|body|pack|prepare|yield|return)\b", "bold magenta"),
    (r"\b(?:bool|u8|u16|u32|u64|i8|i16|i32|i64|f16|bf16|f32|f64|c64)\[[\d,]*\]", "cyan"),
    (r"%[\w.]+", "yellow"),
    (r"@[\w.]+", "green"),
    (r"(?<== )[a-z_][\w.]*", "bold"),
    (r"(?m) {2}\S+\.py:\d+", "dim"),
    (r"kernel=\S+|stream=\S+", "blue"),
]


def graph_lines(
    graph: Graph, names: Names, *, fold: bool = False, costs: bool = False
) -> list[Line]:
    """The lines of `graph` with the node each belongs to."""
    return _Writer(names, fold, costs).graph(graph)


@dataclass(frozen=True, slots=True)
class _Writer:
    names: Names
    fold: bool
    costs: bool

    def graph(self, graph: Graph) -> list[Line]:
        inputs = ", ".join(f"{self.names[v]}: {v.type}" for v in graph.inputs)
        head = f"graph {graph.name}({inputs}) -> {_types(graph.outputs)}"
        lines = [Line(0, head, cost=str(total(graph)) if self.costs else "")]
        for stage, title in (
            ("pack", "pack (once):"),
            ("prepare", "prepare (once for parameters):"),
        ):
            staged = [node for node in graph.nodes if node.stage == stage]
            if staged:
                lines += [Line(2, title), *self.nodes(staged, 4)]
        return [*lines, *self.body(graph, 2, "return")]

    def body(self, graph: Graph, indent: int, last: str) -> list[Line]:
        shown = [n for n in graph.nodes if n.op != "constant" and n.stage == "run"]
        results = ", ".join(self.names[v] for v in graph.outputs)
        return [*self.nodes(shown, indent), Line(indent, f"{last} {results}".rstrip())]

    def nodes(self, nodes: Sequence[Node], indent: int) -> list[Line]:
        if not self.fold:
            return [line for node in nodes for line in self.node(node, indent)]
        lines: list[Line] = []
        for run in repeats(nodes):
            block = nodes[run.start : run.start + run.size]
            if run.count == 1:
                lines += [line for node in block for line in self.node(node, indent)]
                continue
            lines.append(Line(indent, f"{run.count} \u00d7 block:"))
            lines += [line for node in block for line in self.node(node, indent + 2)]
            final = nodes[run.start + run.count * run.size - 1]
            ends = ", ".join(self.names[v] for v in final.outputs)
            lines.append(Line(indent + 2, f"... {run.count - 1} more like it, up to {ends}"))
        return lines

    def node(self, node: Node, indent: int) -> list[Line]:
        names = self.names
        results = ", ".join(f"{names[v]}: {v.type}" for v in node.outputs)
        call = call_text(node, names)
        choices = [f"kernel={node.kernel}"] if node.kernel else []
        if node.stream is not None:
            choices.append(f"stream={_stream(node.stream)}")
        cost = ""
        if self.costs:
            cost = "view" if node.op in VIEWS else str(estimate(node))
        text, origin = f"{results} = {call}", str(node.origin)
        lines = [Line(indent, text, origin, " ".join(choices), node, cost)]
        if not node.bodies:
            return lines
        for body, (own, shared) in zip(node.bodies, body_inputs(node), strict=True):
            heads = ", ".join(f"{names[v]}: {v.type}" for v in own)
            invariants = ", ".join(names[v] for v, _ in shared)
            header = f"{body.name}({heads}{'; ' + invariants if invariants else ''})"
            lines += [Line(indent + 2, header), *self.body(body, indent + 4, "yield")]
        return lines


def call_text(node: Node, names: Names) -> str:
    """The right-hand side of a node's line: its op, operands and settings."""
    if node.op == "constant":
        return "constant"
    return _loop_call(node, names) if node.bodies else _call(node, names)


def _types(values: tuple[Value, ...]) -> str:
    types = [str(v.type) for v in values]
    return types[0] if len(types) == 1 else f"({', '.join(types)})"


def _stream(stream: Any) -> str:
    if isinstance(stream, mx.Device):
        return str(stream.type).rpartition(".")[2]
    return str(stream)


def _call(node: Node, names: Names) -> str:
    operands, attrs = [], []
    parameters = list(OPS[node.op].signature.parameters) if node.op in OPS else list(node.args)
    complete = True
    for name in parameters:
        arg = node.args.get(name)
        if arg is None:
            complete = False
        elif name == "index" and node.op in _INDEXED:
            operands.append(f"[{_index(arg, names)}]")
        elif holds_values(arg):
            operands.append(("" if complete else f"{name}=") + _operand(arg, names))
        else:
            attrs.append(f"{name}={static(arg)}")
    settings = f" {{{', '.join(sorted(attrs))}}}" if attrs else ""
    return f"{node.op}({', '.join(operands)}){settings}"


def holds_values(arg: Any) -> bool:
    """Is `arg` a value, or a tuple with a value in it?"""
    return isinstance(arg, Value) or (isinstance(arg, tuple) and any(map(holds_values, arg)))


def _operand(arg: Any, names: Names) -> str:
    if isinstance(arg, Value):
        return names[arg]
    if isinstance(arg, tuple):
        return f"[{', '.join(_operand(a, names) for a in arg)}]"
    return static(arg)


def _index(arg: Any, names: Names) -> str:
    parts = arg if isinstance(arg, tuple) else (arg,)
    return ", ".join(names[p] if isinstance(p, Value) else _slice(p) for p in parts)


def _slice(part: Any) -> str:
    if part is Ellipsis:
        return "..."
    if not isinstance(part, builtins.slice):
        return str(part)
    ends = ["" if e is None else str(e) for e in (part.start, part.stop)]
    return ":".join(ends) + ("" if part.step is None else f":{part.step}")


def static(arg: Any) -> str:
    """A static argument: dtypes by their short names, the rest as Python writes it."""
    if isinstance(arg, mx.Dtype):
        return SHORT_NAMES[arg]
    if isinstance(arg, tuple):
        return f"({', '.join(map(static, arg))}{',' if len(arg) == 1 else ''})"
    return arg if isinstance(arg, str) else repr(arg)


def _loop_call(node: Node, names: Names) -> str:
    def listed(name: str) -> str:
        return ", ".join(names[v] for v in node.args.get(name, ()))

    operands = listed("carried")
    if node.op == "scan":
        operands += f" | {listed('xs')}" if node.args["xs"] else ""
    if node.op == "cond":
        operands = ", ".join(filter(None, [names[node.operand("pred")], operands]))
    found = [names[source] for _, shared in body_inputs(node) for _, source in shared]
    invariants = ", ".join(dict.fromkeys(found))
    count = trip_count(node, names)
    return f"{node.op}{count}({operands}{'; ' + invariants if invariants else ''})"


def trip_count(node: Node, names: Names) -> str:
    """How often a loop turns, as its print says: `[64]`, `[2:%n]`, or nothing if unknown."""
    if node.op == "scan":
        return f"[{node.args['length']}{', reverse' if node.args['reverse'] else ''}]"
    if node.op != "fori_loop":
        return ""
    ends = [
        names[e] if isinstance(e, Value) else str(e)
        for e in (node.args["lower"], node.args["upper"])
    ]
    return f"[{ends[1]}]" if ends[0] == "0" else f"[{ends[0]}:{ends[1]}]"
