"""Where a region's time goes: its phases, timed by the engine itself."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ...analysis.estimate import estimate
from ...inspection.profile import PhaseTime
from ...ir.graph import Node
from ...ir.kinds import VIEWS
from ...ir.loops import turns
from .cpu.region import NativeRegion
from .steps import Step


class Clock:
    """Times a region on arrays, once a round for all of its nodes."""

    def __init__(self, node: Node, native: NativeRegion, arrays: Sequence[mx.array]) -> None:
        self.node, self.native, self.arrays = node, native, list(arrays)
        self._phases = native.phases()
        self._turns = dict(_turns_of(node, 1))
        self._rounds: list[list[float]] = []
        self._asked: set[Node] = set()

    def timers(self, times: int) -> Iterator[InPhase]:
        """Something to ask, in each round, for the seconds of each node; views take none."""
        self.run()
        steps = [step for phase in self._phases for step in phase.steps]
        for node in dict.fromkeys(node for step in steps for node in step.nodes):
            if node.op not in VIEWS:
                yield InPhase(node, times * self._turns.get(node, 1), self)

    def run(self) -> None:
        nanoseconds = (ctypes.c_int64 * self.native.steps)()
        self.native(self.arrays, nanoseconds)
        self._rounds.append([nanoseconds[phase.place] / 1e9 for phase in self._phases])
        self._asked.clear()

    def seconds(self, node: Node) -> float:
        """Of one turn of a node, in the last round; asked twice, there is a new one."""
        if node in self._asked:
            self.run()
        self._asked.add(node)
        found = 0.0
        for phase, seconds in zip(self._phases, self._rounds[-1], strict=True):
            weights = {n: 1 + estimate(n).nbytes for step in phase.steps for n in step.nodes}
            if node in weights:
                found += seconds * weights[node] / sum(weights.values())
        return found / self._turns.get(node, 1)

    def phases(self) -> list[PhaseTime]:
        """Medians of all rounds."""
        return [
            PhaseTime(
                self.node,
                tuple(step.nodes for step in phase.steps),
                statistics.median(each[i] for each in self._rounds),
                phase.times * sum(map(_bytes, phase.steps)),
            )
            for i, phase in enumerate(self._phases)
        ]


def _bytes(step: Step) -> float:
    """What a step moves at least: a copy may be of a view, which is said to move nothing."""
    return step.moved or sum(estimate(node).nbytes for node in step.nodes)


@dataclass(slots=True)
class InPhase:
    """A node of a region, timed with all of it."""

    node: Node
    times: int
    clock: Clock
    copies: int = 1

    def seconds(self) -> float:
        return self.clock.seconds(self.node)


def _turns_of(node: Node, times: int) -> Iterator[tuple[Node, int]]:
    """How often the nodes in a node's bodies run; loops that only the run can count turn once."""
    for body in node.bodies:
        for inner in body.nodes:
            yield inner, times
            yield from _turns_of(inner, times * (turns(inner) or 1))
