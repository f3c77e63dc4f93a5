"""What a region does: steps over buffers, in an order of phases.

A step may be cut into tasks that run in any order; steps of one phase run at the same time; between
phases lies a barrier.  A step's level is the phase of its list that it runs in: the first after all
that it reads is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...ir.graph import Node
from .arrays import Buffer


@dataclass(eq=False)
class Step:
    """A kind of work.

    Attributes:
        kind: which, by the numbers of the back end.
        level: the phase it runs in.
        args: its arguments as the back end has them.
        reads, writes: the buffers it touches.
        nodes: what it carries out.
        moved: bytes that it reads and writes where its nodes do not say: of a copy, whichever node
            it is for, and of what no node asked for; 0 elsewhere.
    """

    kind: int
    level: int
    args: Any
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    nodes: tuple[Node, ...] = ()
    moved: int = 0


@dataclass(eq=False)
class Loop:
    """Steps that are repeated, a phase by itself: `test`, then `turn`, while the test gives true.

    Attributes:
        level: the phase.
        test: steps that give `go_on`.
        go_on: a bool or integer without axes, in the back end's form; 0 ends the loop.
        turn: the steps of a turn.
        once: is it a branch, whose turn runs once at most?
        turns: how often it turns, as far as that is known.
    """

    level: int
    test: list[Step | Loop]
    go_on: Any
    turn: list[Step | Loop]
    once: bool = False
    turns: int = 1


Work = Step | Loop


@dataclass(frozen=True)
class Jump:
    """To a place in the list of phases, if an integer is 0, or always."""

    target: int
    if_zero: Any = None


@dataclass
class Schedule:
    """Phases and jumps in the order in which they stand.

    Attributes:
        entries: each a phase, which is a list of steps, or a jump between phases.
        times: how often each of them is met in a run, as far as that is known.
        loops: first and last entry of each loop, outer ones first.
    """

    entries: list[list[Step] | Jump] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    loops: list[tuple[int, int]] = field(default_factory=list)

    def add(self, entry: list[Step] | Jump, times: int) -> None:
        self.entries.append(entry)
        self.times.append(times)

    @property
    def steps(self) -> Iterator[Step]:
        for entry in self.entries:
            if not isinstance(entry, Jump):
                yield from entry


def scheduled(work: Sequence[Work]) -> Schedule:
    """Phases of all steps, by their levels; each loop stands alone."""
    schedule = Schedule()
    _add(work, schedule, 1)
    return schedule


def _add(work: Sequence[Work], schedule: Schedule, times: int) -> None:
    levels: dict[int, list[Work]] = {}
    for each in work:
        levels.setdefault(each.level, []).append(each)
    for _, together in sorted(levels.items()):
        steps = [each for each in together if isinstance(each, Step)]
        if steps:
            schedule.add(steps, times)
        for each in together:
            if isinstance(each, Loop):
                _add_loop(each, schedule, times * each.turns)


def _add_loop(loop: Loop, schedule: Schedule, times: int) -> None:
    begin = len(schedule.entries)
    place = len(schedule.loops)
    schedule.loops.append((begin, begin))
    _add(loop.test, schedule, times)
    leave = len(schedule.entries)
    schedule.add(Jump(-1, loop.go_on), times)
    _add(loop.turn, schedule, times)
    if not loop.once:
        schedule.add(Jump(begin), times)
    end = len(schedule.entries)
    schedule.entries[leave] = Jump(end, loop.go_on)
    schedule.loops[place] = (begin, end - 1)
