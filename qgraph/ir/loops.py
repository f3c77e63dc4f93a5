"""Loops and branches: what their bodies take, carry and share, and how often they turn."""

from __future__ import annotations

from typing import Any

from .graph import Graph, Node, Value


def carried_inputs(node: Node) -> tuple[Value, ...]:
    """The inputs of a loop's body that hold its carried values."""
    count = len(node.args["carried"])
    skip = 1 if node.op == "fori_loop" else 0
    return node.bodies[-1].inputs[skip : skip + count]


def body_inputs(node: Node) -> list[tuple[tuple[Value, ...], list[tuple[Value, Value]]]]:
    """For each body: its own inputs, and pairs of (invariant input, the outer value)."""
    result: list[tuple[tuple[Value, ...], list[tuple[Value, Value]]]] = []
    if not node.bodies:
        return result
    for body, name in zip(node.bodies, invariant_names(node), strict=True):
        outer: tuple[Any, ...] = node.args[name]
        split = len(body.inputs) - len(outer)
        result.append((body.inputs[:split], list(zip(body.inputs[split:], outer, strict=True))))
    return result


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
        for _, shared in body_inputs(node):
            found.update((inner, found.get(outer, outer)) for inner, outer in shared)
    return found


def invariant_names(node: Node) -> tuple[str, ...]:
    """The args that hold the invariant operands of each body."""
    return {
        "while_loop": ("cond_invariants", "invariants"),
        "cond": ("true_invariants", "false_invariants"),
    }.get(node.op, ("invariants",))


def body_entries(node: Node) -> list[list[tuple[Value, Value | None]]]:
    """For each body: its inputs, each with the outer value it starts from, None for a counter.

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: qg.fori_loop(0, 2, lambda i, h: h * 2, x), qg.spec((4,)))
    >>> [str(source) for _, source in body_entries(graph.nodes[-1])[0]]
    ['None', '<input:0 f32[4]>']
    """
    given: tuple[Any, ...] = (*node.args.get("carried", ()), *node.args.get("xs", ()))
    if node.op == "fori_loop":
        given = (None, *given)
    return [[*zip(own, given, strict=True), *shared] for own, shared in body_inputs(node)]


LOOPS = frozenset({"fori_loop", "scan", "while_loop"})


CONTROL_FLOW = LOOPS | {"cond"}


def unchanging(node: Node) -> set[int]:
    """Which of the carried values of a loop are the same at every turn; for a branch, all."""
    if not node.bodies:
        return set()
    count = len(node.args["carried"])
    if node.op == "cond":
        return set(range(count))
    body, skip = node.bodies[-1], int(node.op == "fori_loop")
    return {i for i in range(count) if body.outputs[i] is body.inputs[skip + i]}


def turns(node: Node) -> int | None:
    """How often a loop turns, or None where only the run can tell."""
    if node.op == "scan":
        return int(node.args["length"])
    lower, upper = node.args.get("lower"), node.args.get("upper")
    return max(0, upper - lower) if isinstance(lower, int) and isinstance(upper, int) else None
