"""A graph as the search goes through it: when values are read last, and how results must lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...ir.graph import Graph, Value
from .placement import REPLICATED, Placement

Have = tuple[Placement, ...]
"""Placements that a value has."""


class Frame:
    """One graph.

    Args:
        free: inputs that may have any placement.
        wanted: outputs, by number, that must lie as that one of the `free` does.

    Attributes:
        settles: by the number of a node, outputs that nothing reads after it.
        dies: likewise, values that nothing needs after it.
    """

    def __init__(self, graph: Graph, free: Sequence[Value], wanted: Mapping[int, int]) -> None:
        self.graph = graph
        self.order = tuple(free)
        self.free = frozenset(free)
        self.wanted = wanted
        last: dict[Value, int] = {}
        for place, node in enumerate(graph.nodes):
            for value in (*node.outputs, *node.inputs):
                last[value] = place
        self.settles: dict[int, list[Value]] = {}
        self._pairs: dict[Value, Value] = {}
        for i, value in enumerate(graph.outputs):
            if i in wanted:
                self._pairs.setdefault(value, self.order[wanted[i]])
            if value in last:
                self.settles.setdefault(last[value], []).append(value)
        for value, source in self._pairs.items():
            if value in last:
                last[source] = max(last.get(source, -1), last[value])
        self.dies: dict[int, list[Value]] = {}
        for value, place in last.items():
            self.dies.setdefault(place, []).append(value)

    def wanted_of(self, value: Value, live: Mapping[Value, Have]) -> Placement:
        source = self._pairs.get(value)
        if source is None:
            return REPLICATED
        return live.get(source, (REPLICATED,))[0]
