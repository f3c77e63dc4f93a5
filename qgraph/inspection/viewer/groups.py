"""What folds together when a graph is looked at: stages, loop bodies, layers, parts.

Layers are found by the paths of their weights (`model.layers.3.mlp.up_proj.weight` is read in
`model.layers.3`), so that a layer is one group before and after every pass.  Where weights have no
such names, repeated blocks of nodes stand in for layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from ...ir.graph import Graph, Node
from ...ir.loops import body_inputs
from ..fold import repeats
from ..names import Names
from ..text import STAGES, trip_count

T = TypeVar("T")

_MOST = 300
"""Nodes side by side in one group; more are cut into parts, or they take too long to lay out."""

_PART = 100
_SMALLEST = 3
"""Blocks of fewer nodes are shown as they are."""

_LAYER = re.compile(r"@?(.*?\.\d+)\.")


Block = tuple[str, Sequence[Node]]
"""Nodes of a layer and its label; an empty label for what is in no layer."""


@dataclass(frozen=True, eq=False, slots=True)
class Group:
    """Nodes that show as one box when folded.

    Attributes:
        label: what the box says; unlike that of its neighbours.
        node: the loop or branch whose bodies it holds, for kind "loop".
        body: the body that it holds, for loops with one and for kind "body".
    """

    kind: Literal["stage", "loop", "body", "block", "part"]
    label: str
    parent: Group | None = None
    node: Node | None = None
    body: Graph | None = None


class Groups:
    """The groups of a graph, outer ones first, and the group that each node stands in.

    Attributes:
        all: every group.
        of: the innermost group of a node; None at the top.  A loop's node stands in the group
            around the loop's own.
        loop: the group that a loop's node shows as.

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: qg.fori_loop(0, 9, lambda i, h: h * 2, x), qg.spec((4,)))
    >>> [group.label for group in Groups(graph, Names(graph)).all]
    ['fori_loop[9]']
    """

    def __init__(self, graph: Graph, names: Names) -> None:
        self.all: list[Group] = []
        self.of: dict[Node, Group | None] = {}
        self.loop: dict[Node, Group] = {}
        self._names = names
        self._weights: set[Node] = set()
        """Inputs of bodies that stand for a weight outside."""
        for value in graph.inputs:
            self.of[value.node] = None
        for stage, title in STAGES.items():
            staged = [n for n in graph.nodes if n.stage == stage and n.op != "constant"]
            if staged:
                self._split(staged, self._add(Group("stage", title)))
        self._body(graph, None)

    def path(self, node: Node) -> list[str]:
        """Labels of the groups around a node, the outermost first."""
        found: list[str] = []
        group = self.of.get(node)
        while group is not None:
            found.insert(0, group.label)
            group = group.parent
        return found

    def _add(self, group: Group) -> Group:
        self.all.append(group)
        return group

    def _body(self, graph: Graph, inside: Group | None) -> None:
        for node in graph.nodes:
            if node.op == "constant":
                self.of[node] = inside
        run = [n for n in graph.nodes if n.op != "constant" and n.stage == "run"]
        self._split(run, inside)

    def _split(self, nodes: Sequence[Node], inside: Group | None) -> None:
        """Layers into groups of their own; what stands between them stays outside."""
        units: list[Block] = []
        for label, block in self._layers(nodes) or _repeated(nodes):
            units += [(label, block)] if label else [("", [node]) for node in block]
        self._fill(units, inside)

    def _fill(self, units: Sequence[Block], inside: Group | None) -> None:
        """Layers and single nodes into a group, in parts where they are many."""
        if len(units) > _MOST:
            for part in _cut(units, _PART):
                ends = [label or self._names[b[0].outputs[0]] for label, b in (part[0], part[-1])]
                self._fill(part, self._add(Group("part", f"{ends[0]} to {ends[1]}", inside)))
            return
        for label, block in units:
            if label:
                group = self._add(Group("block", label, inside))
                self._fill([("", [node]) for node in block], group)
                continue
            (node,) = block
            self.of[node] = inside
            if node.bodies:
                self._loop(node, inside)

    def _layers(self, nodes: Sequence[Node]) -> list[Block]:
        """Cut where the next layer's first weight is read; none where layers are not one by one.

        What follows the last weight of the last layer is its own as far as it is like what follows
        in the layer before.
        """
        labels = [self._layer(node) for node in nodes]
        known = [(i, label) for i, label in enumerate(labels) if label]
        starts = [
            (i, x) for (_, was), (i, x) in zip([(0, ""), *known], known, strict=False) if x != was
        ]
        if len(starts) < 2 or len({label for _, label in starts}) < len(starts):
            return []
        ends = [start for start, _ in starts[1:]]
        last = known[-1][0] + 1
        before = max(i for i, _ in known if i < ends[-1]) + 1
        while last < len(nodes) and before < ends[-1] and nodes[last].op == nodes[before].op:
            last, before = last + 1, before + 1
        blocks = [
            (label, nodes[start:end])
            for (start, label), end in zip(starts, [*ends, last], strict=True)
        ]
        return [b for b in [("", nodes[: starts[0][0]]), *blocks, ("", nodes[last:])] if b[1]]

    def _layer(self, node: Node) -> str:
        """The layer whose weights a node reads, if it is one."""
        names = [self._names[v] for v in node.inputs if self._is_weight(v.node)]
        found = {match[1] for name in names if (match := _LAYER.match(name))}
        return found.pop() if len(found) == 1 else ""

    def _is_weight(self, node: Node) -> bool:
        return node.op == "constant" or node.stage != "run" or node in self._weights

    def _loop(self, node: Node, inside: Group | None) -> None:
        label = f"{node.op}{trip_count(node, self._names)}"
        only = node.bodies[0] if len(node.bodies) == 1 else None
        loop = self.loop[node] = self._add(Group("loop", label, inside, node, only))
        for body, (own, shared) in zip(node.bodies, body_inputs(node), strict=True):
            group = loop if only else self._add(Group("body", body.name, loop, node, body))
            for value in (*own, *(inner for inner, _ in shared)):
                self.of[value.node] = group
            self._weights |= {inner.node for inner, v in shared if self._is_weight(v.node)}
            self._body(body, group)


def _repeated(nodes: Sequence[Node]) -> list[Block]:
    """Blocks that are alike, numbered; what is not repeated has no label."""
    blocks: list[Block] = []
    number = 0
    for run in repeats(nodes):
        taken = nodes[run.start : run.start + run.size * run.count]
        if run.count == 1 or run.size < _SMALLEST:
            blocks.append(("", taken))
            continue
        for block in _cut(taken, run.size):
            number += 1
            blocks.append((f"block {number}", block))
    return blocks


def _cut(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
