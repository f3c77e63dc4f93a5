"""Which node of one graph is which node of another: passes rebuild nodes, and nodes keep no name.

A node that a pass did not touch is the very same object.  One that was rebuilt, because what it
reads was, is found again by its op, settings, types, user line and the pass that made it.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..ir.graph import Graph, Node, Value
from ..ir.loops import HOLDERS


def in_order(graph: Graph, inside: Node | None = None) -> Iterator[tuple[Node, Node | None]]:
    """Every node with the loop that it stands in, bodies right after their loop."""
    for node in graph.nodes:
        yield node, inside
        for body in node.bodies:
            yield from in_order(body, node)


def match(before: Graph, after: Graph) -> dict[Node, Node]:
    """The nodes of `before` that live on, with what they are in `after`.

    Nodes are taken as the same in three sweeps: those that are one object; those alike that read
    the same; those merely alike, in order.

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: (qg.exp(x), qg.exp(x) + 1), qg.spec((4,)))
    >>> plan = qg.optimize(graph, target="cpu")
    >>> [node.op for node in match(graph, plan.graph)]
    ['exp', 'constant', 'add']
    """
    old = [node for node, _ in in_order(before)]
    new = [node for node, _ in in_order(after)]
    there = set(new)
    found = {node: node for node in old if node in there}
    key = _Keys(old, new)
    waiting = _Waiting((node for node in old if node not in found), key)
    # Which value before a value after is.
    back = {v: v for node in found for v in node.outputs}
    back.update(zip(after.inputs, before.inputs, strict=False))
    taken = set(found.values())
    for strict in (True, False):
        for node in new:
            if node in taken:
                continue
            pick = waiting.take(node, back, strict)
            if pick is not None:
                taken.add(node)
                found[pick] = node
                back.update(zip(node.outputs, pick.outputs, strict=False))
    return {node: found[node] for node in old if node in found}


class _Waiting:
    """Nodes before that are not found yet, by what they are and what they read."""

    def __init__(self, nodes: Iterable[Node], key: _Keys) -> None:
        self._key = key
        self._alike: dict[Any, dict[Node, None]] = defaultdict(dict)
        self._exact: dict[Any, dict[Node, None]] = defaultdict(dict)
        self._readers: dict[Any, list[Node]] = defaultdict(list)
        self._places: dict[Node, int] = {}
        for i, node in enumerate(nodes):
            key = self._key(node)
            self._places[node] = i
            self._alike[key][node] = None
            self._exact[(key, tuple(map(_read, node.inputs)))][node] = None
            for value in node.inputs:
                self._readers[(key, _read(value))].append(node)

    def take(self, node: Node, back: dict[Value, Value], strict: bool) -> Node | None:
        """The node that `node` is: it reads the same or, if not strict, most of the same."""
        key = self._key(node)
        reads = tuple(_read(back.get(v, v)) for v in node.inputs)
        if strict:
            pick = next(iter(self._exact.get((key, reads), ())), None)
        else:
            pick = self._likest(key, reads)
        if pick is not None:
            del self._alike[key][pick]
            del self._exact[(key, tuple(map(_read, pick.inputs)))][pick]
        return pick

    def _likest(self, key: Any, reads: tuple[Any, ...]) -> Node | None:
        alike = self._alike.get(key, {})
        shared = Counter(
            n for read in reads for n in self._readers.get((key, read), ()) if n in alike
        )
        if shared:
            return min(shared, key=lambda n: (-shared[n], self._places[n]))
        return next(iter(alike), None)


def _read(value: Value) -> Any:
    """What a value is known by: inputs, which passes make anew, by name and type."""
    node = value.node
    return (node.args["name"], str(value.type)) if node.op == "input" else value


class _Keys:
    """What makes nodes alike: op, settings, types and where they come from.

    Constants are alike if they hold one array.  Graphs that were read from files share none: there
    it is the name and the elements, looked at where both graphs have a constant so named.
    """

    def __init__(self, old: Sequence[Node], new: Sequence[Node]) -> None:
        sides = [[n for n in nodes if n.op == "constant"] for nodes in (old, new)]
        before, after = ({id(n.args["data"]) for n in side} for side in sides)
        self._shared = before & after
        before_names, after_names = (set(map(_name, side)) for side in sides)
        self._in_both = before_names & after_names

    def __call__(self, node: Node) -> Any:
        where = (node.origin.file, node.origin.line, node.origin.label, node.origin.made_by)
        if node.op in HOLDERS:  # hoisting makes a loop anew, with more operands
            return (node.op, *where[:-1])
        types = tuple(str(v.type) for v in node.outputs)
        if node.op == "constant":
            return (node.op, types, self._constant(node))
        if node.op == "input":
            return (node.op, types, node.args["name"])
        return (node.op, repr(node.attrs), types, *where)

    def _constant(self, node: Node) -> Any:
        data, name = node.args["data"], _name(node)
        if id(data) in self._shared or name not in self._in_both or data.is_released:
            return id(data)
        return name, _digest(data.array)


def _name(node: Node) -> tuple[str, str]:
    return node.args["name"], str(node.output.type)


def _digest(array: mx.array) -> bytes:
    flat = mx.contiguous(array).reshape(-1)
    return hashlib.sha256(np.asarray(flat.view(mx.uint8)).tobytes()).digest()
