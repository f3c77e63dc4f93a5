"""What makes a value change: nothing, a new set of parameters, a new call, the next turn of a loop.

For reasons in words.  What may move is for `hoist-quantize` to decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..ir.graph import Graph, Node, Value
from ..ir.kinds import VIEWS
from ..ir.loops import bodies, body_inputs, unchanging
from ..ir.ops import RANDOM

NEVER, PARAMETERS, CALLS, TURNS, HELD = range(5)


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
    _follow(graph, known)
    return known


def _follow(graph: Graph, known: dict[Value, Change]) -> None:
    for node in graph.nodes:
        most = max((known[v] for v in node.inputs), key=lambda c: c.level, default=None)
        change = most or Change(NEVER, "constants alone")
        if node.op == "keep":
            change = Change(HELD, "qg.keep, which holds it where it is")
        elif node.op in RANDOM and change.level < CALLS:
            change = Change(CALLS, "random numbers")
        known.update(dict.fromkeys(node.outputs, change))
        fixed = unchanging(node)
        for body in bodies(node):
            known.update((inner, _turn(node, inner)) for inner in body.own)
            known.update((body.carried[i], known[node.args["carried"][i]]) for i in fixed)
            known.update((inner, known[outer]) for inner, outer in body.shared)
            _follow(body.graph, known)


def _turn(node: Node, inner: Value) -> Change:
    name = inner.node.args["name"] or "a value"
    return Change(TURNS, f"{name}, which changes from turn to turn of the {node.op}")


def readers(graph: Graph, value: Value) -> Iterator[Node]:
    """The nodes of one graph that read `value`, as it is or through views, but for the views."""
    pending, seen = [value], set()
    while pending:
        for node in graph.users.get(pending.pop(), ()):
            if node not in seen:
                seen.add(node)
                if node.op in VIEWS:
                    pending.append(node.output)
                else:
                    yield node


def behind_views(value: Value) -> Value:
    """What `value` is a view of."""
    while value.node.op in VIEWS and value.node.inputs:
        value = value.node.inputs[0]
    return value


def fixed_values(graph: Graph) -> set[Value]:
    """The values, in bodies too, that are the same at every call: weights and what is made of them.

    Random numbers, what `qg.keep` holds, and results of loops are computed anew each time.

    >>> import qgraph as qg
    >>> w = qg.tensor([1.0])
    >>> graph = qg.trace(lambda x: x + qg.exp(w), qg.spec((1,)))
    >>> sorted(v.node.op for v in fixed_values(graph))
    ['constant', 'exp']
    """
    return _fixed(graph, {v for v in graph.inputs if v.node.args["parameter"]})


def _fixed(graph: Graph, given: set[Value]) -> set[Value]:
    found = set(given)
    for node in graph.nodes:
        stays = node.bodies or node.op in RANDOM or node.op == "keep"
        if node.op == "constant" or (
            node.inputs and not stays and all(v in found for v in node.inputs)
        ):
            found.update(node.outputs)
        for body, (_, shared) in zip(node.bodies, body_inputs(node), strict=True):
            found |= _fixed(body, {inner for inner, outer in shared if outer in found})
    return found
