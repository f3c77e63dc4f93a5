"""Which node of one graph is which node of another: passes rebuild nodes, and nodes keep no name.

A node that a pass did not touch is the very same object.  One that was rebuilt, because what it
reads was, is found again by its op, settings, types, user line and the pass that made it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from .ir import Graph, Node, Value
from .ops import CONTROL_FLOW


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
    values: dict[Value, Value] = {v: v for node in found for v in node.outputs}
    values.update(zip(before.inputs, after.inputs, strict=False))
    waiting: dict[Any, list[Node]] = defaultdict(list)
    for node in old:
        if node not in found:
            waiting[_key(node)].append(node)
    taken = set(found.values())
    for strict in (True, False):
        for node in new:
            if node in taken:
                continue
            alike = waiting.get(_key(node), [])
            pick = next((n for n in alike if _reads_the_same(n, node, values)), None)
            if pick is None and not strict and alike:
                pick = max(alike, key=lambda n: _shared_reads(n, node, values))
            if pick is not None:
                alike.remove(pick)
                taken.add(node)
                found[pick] = node
                values.update(zip(pick.outputs, node.outputs, strict=False))
    return {node: found[node] for node in old if node in found}


def _key(node: Node) -> Any:
    where = (node.origin.file, node.origin.line, node.origin.label, node.origin.made_by)
    if node.op in CONTROL_FLOW:
        return (node.op, *where)
    types = tuple(str(v.type) for v in node.outputs)
    if node.op == "constant":
        return (node.op, types, id(node.args["data"]))
    if node.op == "input":
        return (node.op, types, node.args["name"])
    return (node.op, repr(node.attrs), types, *where)


def _same(a: Value, b: Value, values: dict[Value, Value]) -> bool:
    if values.get(a) is b:
        return True
    if a.node.op == b.node.op == "input":
        return bool(a.node.args["name"] == b.node.args["name"] and a.type == b.type)
    return False


def _reads_the_same(a: Node, b: Node, values: dict[Value, Value]) -> bool:
    if len(a.inputs) != len(b.inputs):
        return False
    return all(_same(x, y, values) for x, y in zip(a.inputs, b.inputs, strict=True))


def _shared_reads(a: Node, b: Node, values: dict[Value, Value]) -> int:
    return sum(_same(x, y, values) for x, y in zip(a.inputs, b.inputs, strict=False))
