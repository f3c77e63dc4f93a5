"""Finding repeated layers: stretches of nodes that do the same again and again."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.graph import Node, Value, map_values

_SAVES = 4
"""Fold only where at least so many lines go."""


@dataclass(frozen=True, slots=True)
class Run:
    """`count` blocks of `size` nodes each from `start` on; `count` is 1 for a stretch unfolded."""

    start: int
    size: int
    count: int


def repeats(nodes: Sequence[Node]) -> list[Run]:
    """Cut `nodes` into stretches, repeated blocks found from left to right.

    Two blocks are alike if their nodes have the same ops, static arguments, types, user lines,
    kernels and streams, and read each other at the same distances; weights and inputs of one type
    are alike, those of a module if their paths differ in numbers only.  What the first block reads
    from before it, such as the input of the first layer, stands for one value that the second
    reads instead, the same wherever it is read.
    """
    ids: dict[Any, int] = {}
    marks = [ids.setdefault(_signature(node), len(ids)) for node in nodes]
    places: dict[int, list[int]] = defaultdict(list)
    for i, mark in enumerate(marks):
        places[mark].append(i)
    rank = {i: k for spots in places.values() for k, i in enumerate(spots)}
    index = {value: i for i, node in enumerate(nodes) for value in node.outputs}
    runs: list[Run] = []
    i = plain = 0
    while i < len(nodes):
        spots, here = places[marks[i]], rank[i]
        best = Run(i, 1, 1)
        for j in spots[here + 1 : here + 17]:
            count = _count(nodes, marks, index, i, j - i)
            if (count - 1) * (j - i) > (best.count - 1) * best.size:
                best = Run(i, j - i, count)
        if (best.count - 1) * best.size >= _SAVES:
            if plain < i:
                runs.append(Run(plain, i - plain, 1))
            runs.append(best)
            i = plain = i + best.count * best.size
        else:
            i += 1
    if plain < len(nodes):
        runs.append(Run(plain, len(nodes) - plain, 1))
    return runs


def _signature(node: Node) -> tuple[Any, ...]:
    outputs = tuple(str(v.type) for v in node.outputs)
    inputs = tuple((str(v.type), _path(v)) for v in node.inputs)
    origin = (node.origin.file, node.origin.line)
    bodies = tuple(id(body) for body in node.bodies)
    # Which arguments are values counts, and so does their place among the parts of an index.
    args = tuple((n, repr(map_values(arg, lambda _: "a value"))) for n, arg in node.args.items())
    return (node.op, args, outputs, inputs, origin, node.kernel, str(node.stream), bodies)


def _path(value: Value) -> str:
    """The path of a weight in its module without the numbers of layers; of others nothing."""
    name = str(value.node.args.get("name", "")) if value.node.op in ("constant", "input") else ""
    return re.sub(r"\d+", "#", name) if "." in name else ""


def _count(
    nodes: Sequence[Node], marks: Sequence[int], index: dict[Value, int], start: int, size: int
) -> int:
    """How many blocks of `size` nodes from `start` on are alike."""
    at = start
    entry: dict[Value, Value] = {}
    while at + 2 * size <= len(nodes):
        for i in range(at, at + size):
            if marks[i] != marks[i + size] or not _linked_alike(
                nodes[i], nodes[i + size], index, size, start, entry
            ):
                return (at - start) // size + 1
        at += size
    return (at - start) // size + 1


def _linked_alike(
    a: Node, b: Node, index: dict[Value, int], size: int, start: int, entry: dict[Value, Value]
) -> bool:
    """Do nodes of two neighbouring blocks read each other's counterparts?

    `entry` collects what the second block reads where the first reads a value from before both.
    """
    for x, y in zip(a.inputs, b.inputs, strict=True):
        i, j = index.get(x), index.get(y)
        if i is None and j is None:
            continue  # a layer's own weights and cache
        if index[a.outputs[0]] < start + size and (i is None or i < start):
            if entry.setdefault(x, y) is not y:
                return False
        elif x is not y and (i is None or j is None or j - i != size):
            return False
    return True
