"""How a graph came about: the passes that ran, each with its graph before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ..ir.graph import Graph, Node, Value
from ..target import Target
from .ledger import Entry


@dataclass(frozen=True)
class PlanStep:
    """One pass that ran: the graph before and after, the time it took, what it decided.

    Attributes:
        contract: "exact", or "tolerance" where the pass promises no more.
        replaced: which value took which one's place, where the pass used `rewrite`.
    """

    name: str
    before: Graph
    after: Graph
    milliseconds: float
    entries: tuple[Entry, ...] = ()
    contract: str = "tolerance"
    replaced: Mapping[Value, Value] = field(default_factory=dict, repr=False)

    @property
    def changed(self) -> bool:
        return self.after is not self.before

    def summary(self) -> str:
        """What changed, in a few words."""
        if not self.changed:
            return "nothing"
        decided: dict[str, int] = {}
        for entry in self.entries:
            decided[entry.decision] = decided.get(entry.decision, 0) + 1
        words = [f"{count} {decision}" for decision, count in decided.items()]
        removed, added = node_changes(self.before, self.after)
        words.append(f"{len(removed)} nodes out, {len(added)} in")
        return ", ".join(words)


def node_changes(before: Graph, after: Graph) -> tuple[list[Node], list[Node]]:
    """Nodes that only `before` holds and nodes that only `after` holds, bodies included."""
    old = dict.fromkeys(node for _, node in before.walk())
    new = dict.fromkeys(node for _, node in after.walk())
    return [n for n in old if n not in new], [n for n in new if n not in old]


class Pass(Protocol):
    """What the optimizer runs: a name, and a function from graph to graph.

    A pass that changes nothing returns the graph it was given.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, graph: Graph) -> Graph: ...


@dataclass(frozen=True)
class History:
    """A graph, how it came about, and what it is for.

    Attributes:
        graph: as the last pass left it.
        source: as it was written.
        target: what it was made for.
        steps: every pass that ran.
        lowered: what was decided when a program of it was made ready.
    """

    graph: Graph
    source: Graph
    target: Target
    steps: tuple[PlanStep, ...] = field(default=())
    lowered: tuple[Entry, ...] = ()
