"""Names of values, made when a graph is shown; nodes carry none."""

from __future__ import annotations

import difflib
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import InputError
from .ir import Graph, Node, Value

_PARTS = ("q", "s", "b")
_SUFFIX = {"pack_weight": "packed", "concatenate": "merged"}


def literal(array: mx.array) -> str:
    """A number of no axes, as short as tells it from its neighbours in its dtype.

    >>> literal(mx.array(0.1)), literal(mx.array(3)), literal(mx.array(True))
    ('0.1', '3', 'True')
    """
    if array.dtype == mx.bfloat16:
        return f"{array.item():.4g}"
    text = str(np.array(array))
    return text.removesuffix(".0") if mx.issubdtype(array.dtype, mx.floating) else text


class Names:
    """A name for every value of a graph and its bodies; the same graph gets the same names.

    Constants are `@name`, numbers stand for themselves, what is packed keeps its weight's name
    (`w_q`, `w_s`, `w_b`), loop results are called as the loop calls them, the rest `%0`, `%1`, …
    """

    def __init__(self, graph: Graph) -> None:
        self._names: dict[Value, str] = {}
        self._taken: set[str] = set()
        self._numbers = 0
        self._unnamed = 0
        for value in graph.inputs:
            self._give(value, str(value.node.args["name"]) or "x")
        self._name_nodes(graph)

    def __getitem__(self, value: Value) -> str:
        return self._names.get(value, "<not in this graph>")

    def find(self, name: str) -> Value:
        """The value that prints call `name`; the `%` or `@` may be left out.

        Raises:
            InputError: there is none.
        """
        for mark in ("", "%", "@"):
            for value, known in self._names.items():
                if known == mark + name:
                    return value
        near = difflib.get_close_matches(name, self._names.values(), n=3, cutoff=0.4)
        raise InputError(
            f"no value is called {name!r}",
            hint=f"did you mean {' or '.join(near)}?" if near else "print the graph for its names",
        )

    def _give(self, value: Value, wanted: str) -> None:
        name, n = wanted, 1
        while name in self._taken:
            n += 1
            name = f"{wanted}_{n}"
        self._taken.add(name)
        self._names[value] = name

    def _number(self, value: Value) -> None:
        self._give(value, f"%{self._numbers}")
        self._numbers += 1

    def _name_nodes(self, graph: Graph) -> None:
        for node in graph.nodes:
            if node.op == "constant":
                self._name_constant(node)
                continue
            if node.stage != "run":
                self._name_packed(node)
            elif node.bodies:
                self._name_loop(node)
            else:
                for value in node.outputs:
                    self._number(value)

    def _name_constant(self, node: Node) -> None:
        if node.output.type.shape == () and not node.args["data"].is_released:
            self._names[node.output] = literal(node.args["data"].array)
            return
        name = str(node.args["name"])
        if not name:
            name, self._unnamed = f"c{self._unnamed}", self._unnamed + 1
        self._give(node.output, f"@{name}")

    def _name_packed(self, node: Node) -> None:
        source = self[node.inputs[0]].lstrip("@%") if node.inputs else node.op
        if node.op == "quantize":
            for value, part in zip(node.outputs, _PARTS, strict=False):
                self._give(value, f"{source}_{part}")
            return
        base = source if source[:1].isalpha() else node.op
        for value in node.outputs:
            self._give(value, f"{base}_{_SUFFIX.get(node.op, node.op)}")

    def _name_loop(self, node: Node) -> None:
        results = [str(v.node.args["name"]) for v in carried_inputs(node)]
        for i, value in enumerate(node.outputs):
            if i < len(results) and results[i] and node.op != "cond":
                self._give(value, f"%{results[i]}")
            else:
                self._number(value)
        for body, (own, shared) in zip(node.bodies, body_inputs(node), strict=True):
            outer = self._taken
            for value in own:
                self._give(value, str(value.node.args["name"]) or "x")
            for value, source in shared:
                self._names[value] = self[source]
            self._name_nodes(body)
            self._taken |= outer


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
