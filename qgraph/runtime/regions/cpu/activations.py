"""Activations as a graph spells them: what a product's step can do to its sums."""

from __future__ import annotations

import math
from collections.abc import Mapping

import mlx.core as mx

from ....ir.graph import Graph, Node, Value, is_scalar

Found = tuple[str, list[Node]]
"""Its name, and its nodes; the last one gives the result."""


def activation(x: Value, body: Graph, uses: Mapping[Value, int]) -> Found | None:
    """The activation of a value that nothing else reads, or None.

    Those of several nodes are computed in float32 without roundings between; in half precision the
    graph's own roundings are kept.
    """
    readers = body.users.get(x, ())
    if uses.get(x) != len(readers):
        return None
    if len(readers) == 1:
        (reader,) = readers
        if reader.op in ("sigmoid", "tanh"):
            return reader.op, [reader]
        if reader.op == "maximum" and _number(reader, x) == 0:
            return "relu", [reader]
    if len(readers) != 2 or x.dtype != mx.float32:
        return None
    return _silu(x, readers, uses) or _gelu(x, readers, body, uses)


def _silu(x: Value, readers: tuple[Node, ...], uses: Mapping[Value, int]) -> Found | None:
    gate, times = readers
    if (
        gate.op == "sigmoid"
        and times.op == "multiply"
        and uses.get(gate.output) == 1
        and set(times.inputs) == {x, gate.output}
    ):
        return "silu", [gate, times]
    return None


def _gelu(
    x: Value, readers: tuple[Node, ...], body: Graph, uses: Mapping[Value, int]
) -> Found | None:
    """x (1 + erf(x / sqrt 2)) / 2; the half may stand at x, too."""
    scaled = next((r for r in readers if _times(r, x, math.sqrt(0.5))), None)
    if scaled is None:
        return None
    (other,) = (r for r in readers if r is not scaled)
    erf = _only(scaled, body, uses)
    plus = _only(erf, body, uses)
    if erf is None or erf.op != "erf" or plus is None or plus.op != "add":
        return None
    if _number(plus, erf.output) != 1:
        return None
    made = _only(plus, body, uses)
    if made is None or made.op != "multiply":
        return None
    if made is other and set(made.inputs) == {x, plus.output}:
        half = _only(made, body, uses)
        if half is not None and _times(half, made.output, 0.5):
            return "gelu", [scaled, erf, plus, made, half]
    halved = _times(other, x, 0.5) and uses.get(other.output) == 1
    if halved and set(made.inputs) == {other.output, plus.output}:
        return "gelu", [scaled, erf, plus, other, made]
    return None


def _only(node: Node | None, body: Graph, uses: Mapping[Value, int]) -> Node | None:
    """The one node that reads a node's result."""
    if node is None or uses.get(node.output) != 1:
        return None
    readers = body.users.get(node.output, ())
    return readers[0] if len(readers) == 1 else None


def _number(node: Node, x: Value) -> float | None:
    """The number that a node takes beside x, or None."""
    others = [v for v in node.inputs if v is not x]
    if len(others) != 1 or not is_scalar(others[0]) or node.output.type != x.type:
        return None
    array: mx.array = others[0].node.args["data"].array
    return float(array.item())  # type: ignore[arg-type]


def _times(node: Node, x: Value, factor: float) -> bool:
    """Is a node x by a number, to float32?"""
    number = _number(node, x)
    if number is None or node.op not in ("multiply", "divide"):
        return False
    if node.op == "divide":
        if node.inputs[0] is not x or number == 0:
            return False
        number = 1 / number
    return math.isclose(number, factor, rel_tol=1e-6)
