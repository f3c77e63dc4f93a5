"""How often a value changes: never, with the parameters, at each call, at each turn of a loop.

The one answer to what is fixed here: for passes, which move or prepare what is, and for reasons in
words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..ir.graph import Graph, Node, Value
from ..ir.kinds import MESSAGES, SAME_ELEMENTS
from ..ir.loops import LOOPS, bodies, unchanging
from ..ir.ops import OPS, RANDOM

NEVER, PARAMETERS, CALLS = range(3)
"""Levels; what changes with each turn of the n-th loop around it has `CALLS + n`."""
HELD = 1 << 30
"""The level of what `qg.keep` holds where it is."""


_STAYS = RANDOM | MESSAGES | {"keep"}


def stays(node: Node) -> bool:
    """Must a node be computed where it stands, even if its operands never change?"""
    return bool(node.bodies) or node.op in _STAYS or node.op not in OPS


def level_of(node: Node, levels: Mapping[Value, int], floor: int) -> int:
    """How often what `node` gives changes; `floor` is the level of what stays."""
    if node.op != "constant" and stays(node):
        return floor
    return max((levels[v] for v in node.inputs), default=NEVER)


@dataclass(frozen=True, slots=True)
class Change:
    """`level` is one of the constants above; `by` says in words what brings the change."""

    level: int
    by: str


def changes(graph: Graph) -> dict[Value, Change]:
    """For each value of a graph and its bodies, what of all that it depends on changes most often.

    >>> import mlx.core as mx, qgraph as qg
    >>> graph = qg.trace(lambda w, x: qg.exp(w) + x, qg.spec(4), qg.spec(4), parameters=[0])
    >>> [change.by for change in changes(graph).values()]
    ['the parameter w', 'the argument x', 'the parameter w', 'the argument x']
    """
    known = {}
    for value in graph.inputs:
        level, word = (PARAMETERS, "parameter") if value.node.args["parameter"] else (
            CALLS, "argument")  # fmt: skip
        known[value] = Change(level, f"the {word} {value.node.args['name']}".rstrip())
    _follow(graph, known, 0)
    return known


def fixed_values(graph: Graph) -> set[Value]:
    """The values, in bodies too, that are the same at every call: weights and what is made of them.

    Random numbers, what `qg.keep` holds, and results of loops are computed anew each time.

    >>> import qgraph as qg
    >>> w = qg.tensor([1.0])
    >>> graph = qg.trace(lambda x: x + qg.exp(w), qg.spec((1,)))
    >>> sorted(v.node.op for v in fixed_values(graph))
    ['constant', 'exp']
    """
    return {value for value, change in changes(graph).items() if change.level <= PARAMETERS}


def _follow(graph: Graph, known: dict[Value, Change], depth: int) -> None:
    """Add the values of a graph that stands inside of `depth` loops."""
    for node in graph.nodes:
        known.update(dict.fromkeys(node.outputs, _change(node, known, CALLS + depth)))
        fixed = unchanging(node)
        inside = depth + (node.op in LOOPS)
        for body in bodies(node):
            known.update((inner, _turn(node, inner, inside)) for inner in body.own)
            known.update((body.carried[i], known[node.args["carried"][i]]) for i in fixed)
            known.update((inner, known[outer]) for inner, outer in body.shared)
            _follow(body.graph, known, inside)


def _change(node: Node, known: Mapping[Value, Change], floor: int) -> Change:
    if node.op == "keep":
        return Change(HELD, "qg.keep, which holds it where it is")
    most = max((known[v] for v in node.inputs), key=lambda c: c.level, default=None)
    if node.op != "constant" and stays(node) and (most is None or most.level < floor):
        made = "random numbers" if node.op in RANDOM else f"the {node.op}, which is never moved"
        return Change(floor, made)
    return most or Change(NEVER, "constants alone")


def _turn(node: Node, inner: Value, depth: int) -> Change:
    name = inner.node.args["name"] or "a value"
    return Change(CALLS + depth, f"{name}, which changes from turn to turn of the {node.op}")


def readers(graph: Graph, value: Value) -> Iterator[Node]:
    """The nodes of one graph that read `value`, as it is or through views, but for the views."""
    pending, seen = [value], set()
    while pending:
        for node in graph.users.get(pending.pop(), ()):
            if node not in seen:
                seen.add(node)
                if node.op in SAME_ELEMENTS:
                    pending.append(node.output)
                else:
                    yield node


def behind_views(value: Value) -> Value:
    """What `value` is a view of."""
    while value.node.op in SAME_ELEMENTS and value.node.inputs:
        value = value.node.inputs[0]
    return value
