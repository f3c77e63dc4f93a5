"""Names of values, made when a graph is shown; nodes carry none."""

from __future__ import annotations

import difflib

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..ir.graph import Graph, Node, Value
from ..ir.loops import bodies, body_inputs

_PARTS = ("q", "s", "b")
_SUFFIX = {"pack_weight": "packed", "concatenate": "merged", "distributed.part": "part"}


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
        results = [str(v.node.args["name"]) for v in bodies(node)[-1].carried]
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
