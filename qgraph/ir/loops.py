"""Nodes that hold graphs: the parts of their bodies, and how loops and branches turn.

A node with bodies gives each body its own inputs (a counter, what is carried, slices) and then what
the body shares with the graph around it.  Whoever reads, checks, runs or times such a node asks
here for these parts and for the turns.  A region's body shares all that it takes, and runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..types import as_int
from .graph import Graph, Node, Value

LOOPS = frozenset({"fori_loop", "scan", "while_loop"})
CONTROL_FLOW = LOOPS | {"cond"}

REGION = "region"
"""A stretch that one native kernel may carry out; its body is its meaning."""

HOLDERS = CONTROL_FLOW | {REGION}
"""Ops that hold bodies."""

_SHARED = {
    "while_loop": ("cond_invariants", "invariants"),
    "cond": ("true_invariants", "false_invariants"),
}


@dataclass(frozen=True, slots=True)
class Body:
    """One body of a node, its inputs by what they are, in their order.

    Attributes:
        graph: the body.
        counter: the number of the turn, of a `fori_loop`; a tuple of one or none.
        carried: what a turn hands on to the next; of a branch, its operands.
        slices: one of each of a scan's `xs`.
        shared: pairs of an input and the outer value that it is at every turn.
    """

    graph: Graph
    counter: tuple[Value, ...]
    carried: tuple[Value, ...]
    slices: tuple[Value, ...]
    shared: tuple[tuple[Value, Value], ...]

    @property
    def own(self) -> tuple[Value, ...]:
        """The inputs that are not shared."""
        return (*self.counter, *self.carried, *self.slices)


def bodies(node: Node) -> list[Body]:
    """The bodies of a loop or a branch with the parts of their inputs; of any other node none.

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: qg.fori_loop(0, 2, lambda i, h: h + x, x), qg.spec((4,)))
    >>> (body,) = bodies(graph.nodes[-1])
    >>> len(body.counter), len(body.carried), len(body.slices), len(body.shared)
    (1, 1, 0, 1)
    """
    found = []
    for graph, name in zip(node.bodies, invariant_names(node), strict=bool(node.bodies)):
        outer: tuple[Value, ...] = node.args[name]
        split = len(graph.inputs) - len(outer)
        start = int(node.op == "fori_loop")
        stop = start + len(node.args.get("carried", ()))
        own = graph.inputs[:split]
        shared = tuple(zip(graph.inputs[split:], outer, strict=True))
        found.append(Body(graph, own[:start], own[start:stop], own[stop:], shared))
    return found


def invariant_names(node: Node) -> tuple[str, ...]:
    """The args that hold the outer values which each body shares."""
    return _SHARED.get(node.op, ("invariants",))


def body_inputs(node: Node) -> list[tuple[tuple[Value, ...], tuple[tuple[Value, Value], ...]]]:
    """For each body: its own inputs, and pairs of (invariant input, the outer value)."""
    return [(body.own, body.shared) for body in bodies(node)]


def body_entries(node: Node) -> list[list[tuple[Value, Value | None]]]:
    """For each body: its inputs, each with the outer value it starts from, None for a counter.

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: qg.fori_loop(0, 2, lambda i, h: h * 2, x), qg.spec((4,)))
    >>> [str(source) for _, source in body_entries(graph.nodes[-1])[0]]
    ['None', '<input:0 f32[4]>']
    """
    given = (*node.args.get("carried", ()), *node.args.get("xs", ()))
    return [
        [*zip(b.own, (*(None for _ in b.counter), *given), strict=True), *b.shared]
        for b in bodies(node)
    ]


def constants_behind(graph: Graph) -> dict[Value, Value]:
    """The constant that an input of a loop's body stands for, at any depth.

    >>> import mlx.core as mx, qgraph as qg
    >>> w = mx.ones((4,))
    >>> graph = qg.trace(lambda x: qg.fori_loop(0, 2, lambda i, h: h * w, x), qg.spec((4,)))
    >>> [str(v.type) for v in constants_behind(graph).values()]
    ['f32[4]']
    """
    return {v: source for v, source in outermost(graph).items() if source.node.op == "constant"}


def outermost(graph: Graph) -> dict[Value, Value]:
    """What each invariant operand of a body is outside of all loops."""
    found: dict[Value, Value] = {}
    for _, node in graph.walk():  # loops come before what is in their bodies
        for body in bodies(node):
            found.update((inner, found.get(outer, outer)) for inner, outer in body.shared)
    return found


def unchanging(node: Node) -> set[int]:
    """Which of the carried values of a loop are the same at every turn; for a branch, all."""
    if node.op == "cond":
        return set(range(len(node.args["carried"])))
    if node.op not in LOOPS:
        return set()
    body = bodies(node)[-1]
    handed_on = zip(body.carried, body.graph.outputs, strict=False)
    return {i for i, (before, after) in enumerate(handed_on) if before is after}


def turns(node: Node) -> int | None:
    """How often a loop turns, or None where only the run can tell; once for what is no loop."""
    if node.op not in LOOPS:
        return 1
    if node.op == "scan":
        return int(node.args["length"])
    lower, upper = node.args.get("lower"), node.args.get("upper")
    return max(0, upper - lower) if isinstance(lower, int) and isinstance(upper, int) else None


def turn_order(length: int, reverse: bool) -> range:
    """The places of a scan's slices in the order of its turns."""
    return range(length - 1, -1, -1) if reverse else range(length)


Arrays = list[mx.array]

Runs = Generator[tuple[int, Arrays], Arrays, Arrays]
"""The runs of bodies in order: gives which body and its own inputs, is sent what that body gave,
and returns the node's results.

It keeps nothing of what it gives and is sent: who empties those lists holds the arrays alone, and
MLX may write into their buffers.
"""


def runs(node: Node, look_up: Callable[[Value], mx.array]) -> Runs:
    """The runs of the bodies of a node, on what `look_up` knows of its operands."""
    carried = [look_up(v) for v in node.args["carried"]]
    if node.op == REGION:
        return _once()
    if node.op == "cond":
        return _branch(bool(look_up(node.operand("pred")).item()), carried)
    if node.op == "while_loop":
        return _while(carried)
    if node.op == "fori_loop":
        lower, upper = (_bound(node.args[name], look_up) for name in ("lower", "upper"))
        return _count(lower, upper, carried)
    return _scan(node, carried, [look_up(v) for v in node.args["xs"]])


def carry_out(
    node: Node, look_up: Callable[[Value], mx.array], run: Callable[[int, Arrays], Arrays]
) -> Arrays:
    """The results of a loop or a branch.

    Args:
        look_up: the array of an operand.
        run: gets the position of a body and its own inputs, and gives its results.

    >>> import mlx.core as mx, qgraph as qg
    >>> graph = qg.trace(lambda x: qg.fori_loop(0, 3, lambda i, h: h * 2, x), qg.spec((1,)))
    >>> carry_out(graph.nodes[-1], lambda v: mx.ones(1), lambda body, own: [own[1] * 2])
    [array([8], dtype=float32)]
    """
    steps = runs(node, look_up)
    try:
        which, own = next(steps)
        while True:
            which, own = steps.send(run(which, own))
    except StopIteration as end:
        results: Arrays = end.value
        return results


def _bound(bound: Any, look_up: Callable[[Value], mx.array]) -> int:
    return as_int(look_up(bound)) if isinstance(bound, Value) else int(bound)


def _count(lower: int, upper: int, carried: Arrays) -> Runs:
    for i in range(lower, upper):
        given = [mx.array(i, mx.int32), *carried]
        carried.clear()
        carried = yield 0, given
    return carried


def _scan(node: Node, carried: Arrays, xs: Arrays) -> Runs:
    kept = len(carried)
    types = [v.type for v in node.outputs[kept:]]
    stacked: list[Arrays] = [[] for _ in types]
    for i in turn_order(node.args["length"], node.args["reverse"]):
        given = [*carried, *(x[i] for x in xs)]
        carried.clear()
        results = yield 0, given
        carried = results[:kept]
        for column, y in zip(stacked, results[kept:], strict=True):
            column.append(y)
        del results
    if node.args["reverse"]:
        for column in stacked:
            column.reverse()
    ys = [
        mx.stack(column) if column else mx.zeros(t.shape, t.dtype)
        for column, t in zip(stacked, types, strict=True)
    ]
    return [*carried, *ys]


def _while(carried: Arrays) -> Runs:
    while (yield 0, list(carried))[0].item():
        given = [*carried]
        carried.clear()
        carried = yield 1, given
    return carried


def _once() -> Runs:
    return (yield 0, [])


def _branch(true: bool, operands: Arrays) -> Runs:
    return (yield (0 if true else 1), operands)
