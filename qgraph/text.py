"""Graphs as text: what `print(graph)` shows."""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .ir import Graph, Node, Value
from .names import Names, body_inputs
from .ops import OPS
from .types import SHORT_NAMES

_INDEXED = {"getitem"} | {name for name in OPS if name.startswith("at_")}
_MARGIN = 88
"""Origins stand in one column, no further right than this unless a line is longer."""


@dataclass(frozen=True, slots=True)
class Format:
    """What to show.

    Attributes:
        origins: the user's line beside each node.
        choices: kernel and stream, where a pass chose them.
    """

    origins: bool = True
    choices: bool = True


@dataclass(slots=True)
class Line:
    indent: int
    text: str
    origin: str = ""
    choices: str = ""
    node: Node | None = None


def format_graph(graph: Graph, options: Format | None = None) -> str:
    """The text of `graph`, the same from run to run."""
    options = options or Format()
    lines = graph_lines(graph, Names(graph))
    shown = [line for line in lines if options.origins and line.origin]
    lengths = [len(line.text) + line.indent for line in shown]
    column = max((n for n in lengths if n <= _MARGIN), default=0) + 2
    result = []
    for line in lines:
        text = " " * line.indent + line.text
        notes = [line.origin] if options.origins and line.origin else []
        notes += [line.choices] if options.choices and line.choices else []
        gap = text.ljust(column - 2) + "  "
        result.append((gap + "  ".join(notes)).rstrip() if notes else text)
    return "\n".join(result)


def graph_lines(graph: Graph, names: Names) -> list[Line]:
    """The lines of `graph` with the node each belongs to."""
    inputs = ", ".join(f"{names[v]}: {v.type}" for v in graph.inputs)
    lines = [Line(0, f"graph {graph.name}({inputs}) -> {_types(graph.outputs)}")]
    for stage, title in (("pack", "pack (once):"), ("prepare", "prepare (once for parameters):")):
        staged = [node for node in graph.nodes if node.stage == stage]
        if staged:
            lines.append(Line(2, title))
            lines += [line for node in staged for line in _node_lines(node, names, 4)]
    lines += _body_lines(graph, names, 2, "return")
    return lines


def _types(values: tuple[Value, ...]) -> str:
    types = [str(v.type) for v in values]
    return types[0] if len(types) == 1 else f"({', '.join(types)})"


def _body_lines(graph: Graph, names: Names, indent: int, last: str) -> list[Line]:
    lines = [
        line
        for node in graph.nodes
        if node.op != "constant" and node.stage == "run"
        for line in _node_lines(node, names, indent)
    ]
    results = ", ".join(names[v] for v in graph.outputs)
    return [*lines, Line(indent, f"{last} {results}".rstrip())]


def _node_lines(node: Node, names: Names, indent: int) -> list[Line]:
    results = ", ".join(f"{names[v]}: {v.type}" for v in node.outputs)
    call = _loop_call(node, names) if node.bodies else _call(node, names)
    choices = [f"kernel={node.kernel}"] if node.kernel else []
    if node.stream is not None:
        choices.append(f"stream={_stream(node.stream)}")
    line = Line(indent, f"{results} = {call}", str(node.origin), " ".join(choices), node)
    lines = [line]
    if not node.bodies:
        return lines
    for body, (own, shared) in zip(node.bodies, body_inputs(node), strict=True):
        heads = ", ".join(f"{names[v]}: {v.type}" for v in own)
        invariants = ", ".join(names[v] for v, _ in shared)
        header = f"{body.name}({heads}{'; ' + invariants if invariants else ''})"
        lines.append(Line(indent + 2, header, node=node))
        lines += _body_lines(body, names, indent + 4, "yield")
    return lines


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
