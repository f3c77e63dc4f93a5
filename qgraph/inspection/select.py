"""Choosing nodes of a graph: by op, name, line, or what feeds or reads a value."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ..errors import InputError
from ..ir.graph import Graph, Node, Value
from ..ir.loops import body_inputs
from .names import Names

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, slots=True)
class Selection:
    """Which nodes to show; all conditions given must hold.

    Attributes:
        op: pattern for the op, where `*` stands for anything.
        name: pattern for the names of results, and of weights and inputs that are read.
        line: `file.py`, `12` or `file.py:12`: where the user wrote it.
        feeds: a value's name; only what it is computed from, and itself.
        reads: a value's name; only what is computed from it, and itself.
        depth: how many steps from that value; None for all.
    """

    op: str | None = None
    name: str | None = None
    line: str | None = None
    feeds: str | None = None
    reads: str | None = None
    depth: int | None = None

    def nodes(self, graph: Graph, names: Names) -> set[Node] | None:
        """The chosen nodes, those of bodies too; None where no condition is given.

        Raises:
            InputError: no value is called as `feeds` or `reads` says.
        """
        if self.op is self.name is self.line is self.feeds is self.reads is None:
            return None
        chosen = {node for _, node in graph.walk() if self._matches(node, names)}
        if self.feeds is not None or self.reads is not None:
            links = dependencies(graph)
            if self.feeds is not None:
                chosen &= self._near(links.reverse(copy=False), names.find(self.feeds))
            if self.reads is not None:
                chosen &= self._near(links, names.find(self.reads))
        return chosen

    def _near(self, links: nx.DiGraph, value: Value) -> set[Node]:
        import networkx as nx

        if value.node not in links:
            raise InputError("nothing in this graph computes or reads that value")
        return set(nx.single_source_shortest_path_length(links, value.node, cutoff=self.depth))

    def _matches(self, node: Node, names: Names) -> bool:
        if self.op is not None and not fnmatchcase(node.op, self.op):
            return False
        if self.name is not None:
            found = [names[v] for v in node.outputs]
            if not node.bodies:  # a loop is chosen for what it makes, not for all it passes on
                found += [name for v in node.inputs if not (name := names[v]).startswith("%")]
            if not any(fnmatchcase(name.lstrip("@"), self.name.lstrip("@")) for name in found):
                return False
        return self.line is None or self._on_line(node)

    def _on_line(self, node: Node) -> bool:
        assert self.line is not None
        file, _, line = str(node.origin).rpartition(":")
        return self.line in (line, file, f"{file}:{line}")


def dependencies(graph: Graph) -> nx.DiGraph:
    """Edges from each node to those that read it, through the bodies of loops as well.

    A body's inputs are fed by the operands of its loop, and a loop by what its bodies yield.
    """
    import networkx as nx

    links = nx.DiGraph()
    links.add_nodes_from(value.node for value in graph.inputs)
    for _, node in graph.walk():
        links.add_node(node)
        links.add_edges_from((value.node, node) for value in node.inputs)
        if not node.bodies:
            continue
        for body, (own, shared) in zip(node.bodies, body_inputs(node), strict=True):
            links.add_edges_from((source.node, inner.node) for inner, source in shared)
            sources = _operands_of(node, len(own))
            links.add_edges_from(
                (s.node, v.node) for v, s in zip(own, sources, strict=True) if s is not None
            )
            links.add_edges_from((value.node, node) for value in body.outputs)
    return links


def _operands_of(node: Node, count: int) -> list[Value | None]:
    """For each of a body's own inputs, the operand of the loop that starts it."""
    given = [*node.args.get("carried", ()), *node.args.get("xs", ())]
    return [None] * (count - len(given)) + given
