"""What RMS norm and layer norm have in common: how they end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qgraph.ir.graph import Graph, Node, Value

from .raising import Expansion, peel, reads

Parts = Sequence[tuple[str, str]]
"""Ops by which a norm may go on, and which operand each brings."""


def scaled(graph: Graph, centred: Value, root_mean_square: Value) -> Iterator[Value]:
    """The products of a tensor and the reciprocal root of its mean square."""
    for node in reads(graph, root_mean_square, "multiply"):
        if node.inputs[0] is centred:
            yield node.output


def largest(
    graph: Graph, op: str, x: Value, eps: float, end: Value, parts: Parts
) -> list[Expansion]:
    """The norms of `x` of which `end` is the normalized tensor, with all parts that belong to it.

    MLX computes in float32: x may have been cast to it, and the result is cast back unless the
    weight is wider.  One normalized tensor may be read by several weights.
    """
    source = peel(x, "astype")
    tries = [(end, source), (end, x)]
    users = graph.users.get(end, ())
    if len(users) == 1 and users[0].op == "astype" and end not in graph.outputs:
        tries.insert(0, (users[0].output, source))
    for root, operand in tries:
        found = _grown(graph, Expansion(root, op, {"x": operand}, {"eps": eps}), parts)
        if found:
            return found
    return []


def _grown(graph: Graph, guess: Expansion, parts: Parts) -> list[Expansion]:
    for i, (op, name) in enumerate(parts):
        users = graph.users.get(guess.root, ())
        operands = [_vector(node, op, guess.root) for node in users]
        if guess.root in graph.outputs or not users or None in operands:
            continue
        grown = [
            _grown(graph, guess.given(name, operand, node.output), parts[i + 1 :])
            for node, operand in zip(users, operands, strict=True)
            if operand is not None
        ]
        if all(grown):
            return [expansion for some in grown for expansion in some]
    return [guess] if guess.holds else []


def _vector(node: Node, op: str, left: Value) -> Value | None:
    """The vector that `node` brings to `left`, one element for each of its last axis."""
    if node.op != op or node.inputs[0] is not left:
        return None
    right = node.inputs[1]
    vector = right if right.ndim == 1 else peel(right, "broadcast_to")
    return vector if vector.shape == left.shape[-1:] else None
