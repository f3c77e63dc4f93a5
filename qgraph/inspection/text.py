"""Graphs as text: what `print(graph)` shows."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..analysis.estimate import estimate, total
from ..ir.graph import Graph, Node, Value
from ..ir.kinds import VIEWS
from ..ir.loops import REGION, body_inputs
from ..ir.ops import OPS
from ..types import SHORT_NAMES
from .fold import repeats
from .layout import Line, coloured, in_columns, only
from .names import Names
from .select import Selection

STAGES = {"pack": "pack (once)", "prepare": "prepare (once for parameters)"}
"""What the stages before a call are called, in the order in which they run."""

_INDEXED = {"getitem"} | {name for name in OPS if name.startswith("at_")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Format(Selection):
    """What to show, and which nodes (the fields of `Selection`).

    Attributes:
        origins: the user's line beside each node.
        choices: kernel and stream, where a pass chose them.
        costs: at least how many bytes each node moves and how many operations it does.
        fold: repeated layers once, with their number.
        colour: ANSI colours for terminals.
        limit: of a longer list of inputs, results or loop operands only so many.
        notes: a word beside a node, such as `Profile.notes()` gives.
    """

    origins: bool = True
    choices: bool = True
    costs: bool = False
    fold: bool = False
    colour: bool = False
    limit: int | None = None
    notes: Mapping[Node, str] = field(default_factory=dict)


def format_graph(graph: Graph, options: Format | None = None) -> str:
    """The text of `graph`, the same from run to run."""
    options = options or Format()
    names = Names(graph)
    lines = _Writer(names, options.fold, options.costs, options.limit).graph(graph)
    chosen = options.nodes(graph, names)
    if chosen is not None:
        lines = only(lines, chosen)
    text = "\n".join(in_columns(lines, options))
    return coloured(text) if options.colour else text


def graph_lines(graph: Graph, names: Names) -> list[Line]:
    """The lines of `graph` with the node each belongs to."""
    return _Writer(names).graph(graph)


def listed(items: Sequence[str], limit: int | None) -> str:
    """Items with commas; of more than `limit` the first, and how many are left."""
    if limit is None or len(items) <= limit:
        return ", ".join(items)
    return f"{', '.join(items[:limit])}, ... {len(items) - limit} more"


@dataclass(frozen=True, slots=True)
class _Writer:
    names: Names
    fold: bool = False
    costs: bool = False
    limit: int | None = None

    def typed(self, values: Sequence[Value]) -> str:
        return listed([f"{self.names[v]}: {v.type}" for v in values], self.limit)

    def graph(self, graph: Graph) -> list[Line]:
        results = listed([str(v.type) for v in graph.outputs], self.limit)
        many = f"({results})" if len(graph.outputs) != 1 else results
        head = f"graph {graph.name}({self.typed(graph.inputs)}) -> {many}"
        lines = [Line(0, head, cost=str(total(graph)) if self.costs else "")]
        for stage, title in STAGES.items():
            staged = [node for node in graph.nodes if node.stage == stage]
            if staged:
                lines += [Line(2, f"{title}:"), *self.nodes(staged, 4)]
        return [*lines, *self.body(graph, 2, "return")]

    def body(self, graph: Graph, indent: int, last: str) -> list[Line]:
        shown = [n for n in graph.nodes if n.op != "constant" and n.stage == "run"]
        results = listed([self.names[v] for v in graph.outputs], self.limit)
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
            ends = listed([self.names[v] for v in final.outputs], self.limit)
            lines.append(Line(indent + 2, f"... {run.count - 1} more like it, up to {ends}"))
        return lines

    def node(self, node: Node, indent: int) -> list[Line]:
        names = self.names
        call = call_text(node, names, self.limit)
        choices = [f"kernel={node.kernel}"] if node.kernel else []
        if node.stream is not None:
            choices.append(f"stream={_stream(node.stream)}")
        cost = ""
        if self.costs:
            cost = "view" if node.op in VIEWS else str(estimate(node))
        text, origin = f"{self.typed(node.outputs)} = {call}", str(node.origin)
        lines = [Line(indent, text, origin, " ".join(choices), node, cost)]
        if not node.bodies:
            return lines
        for body, (own, shared) in zip(node.bodies, body_inputs(node), strict=True):
            invariants = listed([names[v] for v, _ in shared], self.limit)
            outer = f"; {invariants}" if invariants else ""
            if node.op == REGION:  # its operands are called the same inside, and stand above
                lines += self.body(body, indent + 2, "yield")
                continue
            header = f"{body.name}({self.typed(own)}{outer})"
            lines += [Line(indent + 2, header), *self.body(body, indent + 4, "yield")]
        return lines


def call_text(node: Node, names: Names, limit: int | None = None) -> str:
    """The right-hand side of a node's line: its op, operands and settings."""
    if node.op == "constant":
        return "constant"
    return _loop_call(node, names, limit) if node.bodies else _call(node, names)


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
        elif name != "problem" and arg != node.kernel:
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


def _loop_call(node: Node, names: Names, limit: int | None) -> str:
    def given(name: str) -> str:
        return listed([names[v] for v in node.args.get(name, ())], limit)

    operands = given("carried")
    if node.op == "scan":
        operands += f" | {given('xs')}" if node.args["xs"] else ""
    if node.op == "cond":
        operands = ", ".join(filter(None, [names[node.operand("pred")], operands]))
    found = [names[source] for _, shared in body_inputs(node) for _, source in shared]
    invariants = listed(list(dict.fromkeys(found)), limit)
    if node.op == REGION:
        return f"{node.op}({invariants})"
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
