"""Tracks: one number for a node through all the passes of a plan.

What `matching.match` finds to be the same node keeps its track.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ...ir.graph import Graph, Node
from ...rewrite.history import History, PlanStep
from ..diff import Diff


class Tracks:
    """Gives nodes their tracks, graph after graph."""

    def __init__(self) -> None:
        self._seen: dict[Node, int] = {}
        self._count = itertools.count()

    def __contains__(self, node: Node) -> bool:
        return node in self._seen

    def of(self, node: Node) -> int:
        """The track of a node met before, or a new one."""
        if node not in self._seen:
            self._seen[node] = next(self._count)
        return self._seen[node]

    def first(self, graph: Graph) -> dict[Node, int]:
        """The tracks of a graph's nodes and inputs, those of its bodies too."""
        return {node: self.of(node) for node in nodes_of(graph)}

    def follow(self, diff: Diff) -> dict[Node, int]:
        """The tracks of the graph after a pass; that before has them already."""
        for old, new in diff.same.items():
            self._seen.setdefault(new, self._seen[old])
            for was, now in zip(old.bodies, new.bodies, strict=False):
                self._inputs(was, now)
        self._inputs(diff.before, diff.after)
        return self.first(diff.after)

    def _inputs(self, was: Graph, now: Graph) -> None:
        named = {v.node.args["name"]: v.node for v in was.inputs}
        for value in now.inputs:
            old = named.get(value.node.args["name"])
            if old is not None:
                self._seen.setdefault(value.node, self._seen[old])


def nodes_of(graph: Graph) -> Iterator[Node]:
    """Inputs and nodes, a loop's bodies right after it."""
    for value in graph.inputs:
        yield value.node
    for node in graph.nodes:
        yield node
        for body in node.bodies:
            yield from nodes_of(body)


def changes(plan: History) -> Iterator[tuple[PlanStep, Diff | None]]:
    """Each pass with what it did, None where it changed nothing."""
    steps = list(plan.steps)
    last = steps[-1].after if steps else plan.source
    if last is not plan.graph:  # a plan that was read from a file, or put together by hand
        steps.append(PlanStep("plan", last, plan.graph, 0.0))
    for step in steps:
        changed = step.changed
        yield step, Diff(step.before, step.after, step.entries, step.name) if changed else None


def stages(plan: History) -> Iterator[tuple[str, Graph, dict[Node, int]]]:
    """The graph as written and after each pass that changed it, with the tracks of its nodes."""
    tracks = Tracks()
    yield "as written", plan.source, tracks.first(plan.source)
    for step, diff in changes(plan):
        if diff is not None:
            yield step.name, step.after, tracks.follow(diff)
