"""Loops and branches: what one carries lies on the mesh in one way throughout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from ...ir.graph import Graph, Node, Value
from ...ir.loops import bodies, turns
from .assignment import Assignment
from .placement import REPLICATED, Placement
from .strategies import Strategy

UNKNOWN_TURNS = 16
"""Of a loop whose turns only the run can tell."""

Assign = Callable[[Graph, Sequence[Value], Mapping[int, int]], Assignment]
"""Chooses placements: of a graph, some of whose inputs are free, and some outputs lie as those."""


def assign_bodies(node: Node, assign: Assign) -> list[Assignment]:
    """The placements that suit the bodies of a loop or branch best."""
    *first, last = bodies(node)
    if node.op == "cond":
        return [assign(body.graph, (), {}) for body in (*first, last)]
    chosen = assign(last.graph, last.carried, {i: i for i in range(len(last.carried))})
    if node.op != "while_loop":
        return [chosen]
    # What decides on another turn sees what is carried as it lies.
    same = dict(zip(last.carried, first[0].carried, strict=True))
    decides = assign(first[0].graph, (), {})
    decides.inputs = {same[v]: p for v, p in chosen.inputs.items() if p != REPLICATED}
    return [decides, chosen]


def fixed_slices(node: Node, fixed: Collection[Value]) -> set[Value]:
    """Inputs of a scan's body that are slices of what is the same at every call."""
    if node.op == "cond":
        return set()
    slices = zip(bodies(node)[-1].slices, node.args.get("xs", ()), strict=True)
    return {inner for inner, xs in slices if xs in fixed}


def strategy_of(node: Node, chosen: Sequence[Assignment]) -> Strategy:
    """A loop or branch as a whole, its bodies placed as chosen."""
    needs = [REPLICATED] * len(node.inputs)
    gives = [REPLICATED] * len(node.outputs)
    if node.op == "cond":
        return Strategy(tuple(needs), tuple(gives), 1.0, max(a.seconds for a in chosen))
    carried: list[Placement] = [
        chosen[-1].inputs.get(value, REPLICATED) for value in bodies(node)[-1].carried
    ]
    start = len(node.inputs) - _count_after_carried(node)
    needs[start : start + len(carried)] = carried
    gives[: len(carried)] = carried
    count = turns(node)
    seconds = sum(a.seconds for a in chosen) * (UNKNOWN_TURNS if count is None else count)
    return Strategy(tuple(needs), tuple(gives), 1.0, seconds)


def _count_after_carried(node: Node) -> int:
    """How many of a loop's inputs stand at or after the first that it carries."""
    before = 0
    for name, arg in node.args.items():
        if name == "carried":
            break
        before += len([arg] if isinstance(arg, Value) else _values(arg))
    return len(node.inputs) - before


def _values(arg: object) -> list[Value]:
    return [v for v in arg if isinstance(v, Value)] if isinstance(arg, tuple) else []
