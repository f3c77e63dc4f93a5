"""What the back end for CPUs can carry out, asked of its translator."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from ....ir.graph import Graph, Node, Value, input_value, is_scalar, map_values
from ....kernels.cpu.library import missing
from ..unknown import Unknown
from .translation import translate


def why_no_engine() -> str | None:
    """Why regions cannot run on this machine, or None."""
    return missing()


def refusal(node: Node) -> str | None:
    """Why a node, or something in a body of it, has no place in a region; None if it has one.

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: qg.linalg.inv(qg.exp(x)), qg.spec((4, 4)))
    >>> [refusal(node) for node in graph.nodes]
    [None, 'there is no kind of work for linalg.inv']
    """
    if node.stream is not None:
        return "it has a stream of its own"
    key = None if node.bodies else _key(node)
    if key is None:
        return _asked(node)
    if key not in _answers:
        if len(_answers) >= MOST_ANSWERS:
            _answers.clear()
        _answers[key] = _asked(node)
    return _answers[key]


_answers: dict[Hashable, str | None] = {}
MOST_ANSWERS = 1 << 14
"""A large model asks a hundred questions some thousand times; one answer takes 200 microseconds."""


def _key(node: Node) -> Hashable | None:
    """All that the translator sees of a node without bodies, or None if that is no key.

    Of a constant without axes it sees that it is one; its number only the engine does.
    """
    seen: dict[Value, int] = {}

    def part(arg: Any) -> Hashable:
        if isinstance(arg, Value):
            return seen.setdefault(arg, len(seen)), arg.type, is_scalar(arg)
        if isinstance(arg, tuple):
            return tuple(map(part, arg))
        return type(arg), arg  # 1, 1.0 and True are the same key

    args = tuple((name, part(arg)) for name, arg in node.args.items())
    key = node.op, args, tuple(value.type for value in node.outputs)
    try:
        hash(key)
    except TypeError:  # slices, before Python 3.12
        return None
    return key


def _asked(node: Node) -> str | None:
    inside: dict[Value, Value] = {}
    nodes: list[Node] = []
    for value in node.inputs:
        if value in inside:
            continue
        if is_scalar(value):
            nodes.append(value.node)
            inside[value] = value
        else:
            inside[value] = input_value(value.type)
    args = {name: map_values(arg, inside.__getitem__) for name, arg in node.args.items()}
    alone = node.replace(args=args)
    inputs = [v for v in inside.values() if v.node.op == "input"]
    try:
        translate(Graph("alone", inputs, [*nodes, alone], alone.outputs), {})
    except Unknown as error:
        return str(error)
    return None
