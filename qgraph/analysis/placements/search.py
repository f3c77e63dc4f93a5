"""Choosing a placement for each value: the cheapest way through the graph.

States are carried through the nodes in order: how what is still needed lies on the mesh, and what
it cost to get there.  Of states that agree in the former the cheapest goes on, and of those that
differ so many of the cheapest; so what a choice costs later is known when it is settled, and
placements flow both ways.  Few values are alive at once in a model, so little is lost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ...ir.graph import Graph, Node, Value
from .assignment import Assignment
from .costs import Costs
from .frame import Frame, Have
from .loops import assign_bodies, fixed_slices, strategy_of
from .placement import REPLICATED
from .strategies import Strategy
from .units import Units
from .ways import Ways, is_weight

BEAM = 16
"""States that are kept for each way in which weights are held that are read again."""

WAYS_HELD = 3
"""Such ways that are kept in any case; more of them while no collective tells them apart."""

Choices = tuple["Choices | None", Node, Strategy] | None
"""The strategies chosen so far, the last first."""

_WHOLE: Have = (REPLICATED,)  # from which any other is made for the price of a copy


class State(NamedTuple):
    """How what is still needed lies on the mesh.

    Attributes:
        live: placements of values, where they are not replicated alone.
        seconds: so far.
    """

    live: Mapping[Value, Have]
    seconds: float
    choices: Choices


class Search:
    """Chooses placements for a graph and, within it, for bodies.

    Args:
        graph: the outermost one.
        costs: of the mesh.
        fixed: values that are the same at every call, which may be had in any placement.
    """

    def __init__(self, graph: Graph, costs: Costs, fixed: set[Value]) -> None:
        self.costs = costs
        self.fixed = fixed
        self.units = Units(graph, costs.mesh.size)
        self._inner: dict[Node, list[Assignment]] = {}
        self._ways = Ways(self.units, costs, fixed)

    def assign(
        self, graph: Graph, free: Sequence[Value] = (), wanted: Mapping[int, int] | None = None
    ) -> Assignment:
        """The best placements found.

        Args:
            free: inputs that may have any placement.
            wanted: outputs, by number, that must lie as that one of the `free` does; the others
                are replicated.
        """
        frame = Frame(graph, free, wanted or {})
        states = [State({}, 0.0, None)]
        for place, node in enumerate(graph.nodes):
            if all(v in self.fixed for v in node.outputs):
                continue
            found: dict[frozenset[tuple[Value, Have]], State] = {}
            for state in states:
                for way in self._ways_of(node, state, frame):
                    new = self._step(node, place, state, way, frame)
                    if new is None:
                        continue
                    key = frozenset(new.live.items())
                    if key not in found or new.seconds < found[key].seconds:
                        found[key] = new
            states = self._kept(found.values())
        return self._result(states[0], frame)

    def _kept(self, states: Iterable[State]) -> list[State]:
        """The cheapest states; some of each way in which weights that are read again are held.

        An embedding is read first and, as the head, last: what its placement costs is settled long
        after other states could have crowded it out.
        """
        kept: list[State] = []
        count: Counter[frozenset[tuple[Value, Have]]] = Counter()
        ordered = sorted(states, key=lambda s: s.seconds)
        near = ordered[0].seconds + self.costs.mesh.seconds("all_sum", 0) / 2
        for state in ordered:
            if kept and self._is_beaten(state, kept[0]):
                continue
            held = frozenset((v, have) for v, have in state.live.items() if v in self.fixed)
            if held not in count and len(count) >= WAYS_HELD and state.seconds > near:
                continue
            count[held] += 1
            if count[held] <= BEAM:
                kept.append(state)
        return kept

    def _is_beaten(self, state: State, best: State) -> bool:
        """Is it cheaper to bring all that is alive from the best state to where this one has it?"""
        left = state.seconds - best.seconds
        alive = {v: _WHOLE for v in best.live if v not in state.live and v not in self.fixed}
        for value, have in {**alive, **state.live}.items():
            there = best.live.get(value, () if value in self.fixed else (REPLICATED,))
            for place in have:
                if place in there:
                    continue
                if value in self.fixed:
                    left -= self._ways.holding(value, place)
                else:
                    left -= self.costs.convert(value.type, there, place)[0]
                if left < 0:
                    return False
        return True

    def _ways_of(self, node: Node, state: State, frame: Frame) -> Iterable[Strategy]:
        return [self._loop(node)] if node.bodies else self._ways.of(node, state.live, frame)

    def _step(
        self, node: Node, place: int, state: State, way: Strategy, frame: Frame
    ) -> State | None:
        live = dict(state.live)
        seconds = state.seconds + way.seconds
        seconds += 0.0 if node.bodies else self.costs.node(node, way.share)
        for value, need in zip(node.inputs, way.needs, strict=True):
            if value in self.fixed:
                have = live.get(value, ())
                if need not in have:
                    if is_weight(node, value):
                        seconds += self._ways.holding(value, need)
                    live[value] = (*have, need)
            elif value in frame.free and value not in live and need.kind in ("replicated", "split"):
                live[value] = (need,)
            else:
                have = live.get(value, (REPLICATED,))
                cost, after = self.costs.convert(value.type, have, need)
                if cost == math.inf:
                    return None
                seconds += cost
                live[value] = _WHOLE if REPLICATED in after and value not in frame.free else after
        for value, give in zip(node.outputs, way.gives, strict=True):
            live[value] = (give,)
        return self._settle(place, State(live, seconds, (state.choices, node, way)), frame)

    def _settle(self, place: int, state: State, frame: Frame) -> State | None:
        """Outputs that nothing reads any more take their last form; what is dead is forgotten."""
        live = dict(state.live)
        seconds = state.seconds
        for value in frame.settles.get(place, ()):
            want = frame.wanted_of(value, live)
            cost, _ = self.costs.convert(value.type, live.get(value, (REPLICATED,)), want)
            if cost == math.inf:
                return None
            seconds += cost
        for value in frame.dies.get(place, ()):
            live.pop(value, None)
        for value, have in list(live.items()):
            if have == (REPLICATED,) and value not in frame.free and value not in self.fixed:
                del live[value]
        return State(live, seconds, state.choices)

    def _result(self, state: State, frame: Frame) -> Assignment:
        found = Assignment(seconds=state.seconds)
        choices = state.choices
        while choices is not None:
            before, node, way = choices
            found.strategies[node] = way
            if node.bodies:
                found.bodies[node] = self._inner[node]
            choices = before
        # In order, the first reader of a free input has bound it.
        for node in frame.graph.nodes:
            chosen = found.strategies.get(node)
            if chosen is not None:
                for value, need in zip(node.inputs, chosen.needs, strict=True):
                    if value in frame.free:
                        binds = need.kind in ("replicated", "split")
                        found.inputs.setdefault(value, need if binds else REPLICATED)
        found.outputs = [
            found.inputs.get(frame.order[frame.wanted[i]], REPLICATED)
            if i in frame.wanted
            else REPLICATED
            for i in range(len(frame.graph.outputs))
        ]
        return found

    def _loop(self, node: Node) -> Strategy:
        if node not in self._inner:
            self.fixed |= fixed_slices(node, self.fixed)
            self._inner[node] = assign_bodies(node, self.assign)
        return strategy_of(node, self._inner[node])
