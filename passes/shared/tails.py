"""Caches that one attention updates, and the tails that take their updates in their place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from qgraph.ir.graph import Graph, Node, Value
from qgraph.tracing.tensor import Tensor, apply
from qgraph.types import TensorType

ATTENTION = "cached_attention"


@dataclass(frozen=True)
class Cache:
    """Keys and values that a graph is given, and gives back with a token more.

    Attributes:
        places: of keys and values among the pairs that were asked for.
        attention: the node that reads and updates them.
    """

    places: tuple[int, int]
    attention: Node

    def tail(self, rows: int) -> tuple[TensorType, TensorType]:
        """Types of a tail's keys or values, and of its positions."""
        keys = self.attention.operand("keys").type
        shape = (*keys.shape[:2], rows, keys.shape[3])
        return TensorType(shape, keys.dtype), TensorType((rows,), mx.int32)


def caches_of(graph: Graph, pairs: Iterable[tuple[Value, int]]) -> list[Cache]:
    """The caches that only their attention reads.

    Args:
        pairs: an input and the number of the output that it is the next time.
    """
    place, ends = {}, []
    for i, (value, end) in enumerate(pairs):
        place[value] = i
        ends.append(end)
    readers: dict[Value, list[Node | int]] = {}
    for node in graph.nodes:
        for value in node.inputs:
            readers.setdefault(value, []).append(node)
    for i, value in enumerate(graph.outputs):
        readers.setdefault(value, []).append(i)
    found = []
    for node in graph.nodes:
        if node.op != ATTENTION:
            continue
        before = [node.operand(name) for name in ("keys", "values")]
        places = [place.get(value) for value in before]
        alone = all(
            i is not None and readers[value] == [node] and readers.get(after) == [ends[i]]
            for i, value, after in zip(places, before, node.outputs[1:], strict=True)
        )
        if alone:
            found.append(Cache((place[before[0]], place[before[1]]), node))
    return found


def tail_attention(attention: Node, tail: Sequence[Value], maker: str) -> Node:
    """What takes the place of a `cached_attention`.

    Args:
        tail: its keys, values and positions.
        maker: the pass.
    """
    names = ("q", "k", "v", "keys", "values")
    operands = [*map(attention.operand, names), *tail]
    operands += map(attention.operand, ("position", "last"))
    turning = (attention.value(name) for name in ("freqs", "offset"))
    given = (*operands, *turning)
    settings = {name: attention.args[name] for name in ("heads", "rope", "scale")}
    results = apply(
        "tail_attention", tuple(None if v is None else Tensor(v) for v in given), settings
    )
    made: Node = results[0].value.node
    return made.replace(stream=attention.stream, origin=attention.origin.by(maker))
