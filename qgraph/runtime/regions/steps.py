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
    """

    kind: int
    level: int
    args: Any
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    nodes: tuple[Node, ...] = ()


@dataclass(eq=False)
class Loop:
    """Steps that are repeated, a phase by itself: `test`, then `turn`, while the test gives true.

    Attributes:
        level: the phase.
        test: steps that give `go_on`.
        go_on: a bool or integer without axes, in the back end's form; 0 ends the loop.
        turn: the steps of a turn.
        once: is it a branch, whose turn runs once at most?
    """

    level: int
    test: list[Step | Loop]
    go_on: Any
    turn: list[Step | Loop]
    once: bool = False


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
        loops: first and last entry of each loop, outer ones first.
    """

    entries: list[list[Step] | Jump] = field(default_factory=list)
    loops: list[tuple[int, int]] = field(default_factory=list)

    @property
    def steps(self) -> Iterator[Step]:
        for entry in self.entries:
            if not isinstance(entry, Jump):
                yield from entry


def scheduled(work: Sequence[Work]) -> Schedule:
    """Phases of all steps, by their levels; each loop stands alone."""
    schedule = Schedule()
    _add(work, schedule)
    return schedule


def _add(work: Sequence[Work], schedule: Schedule) -> None:
    levels: dict[int, list[Work]] = {}
    for each in work:
        levels.setdefault(each.level, []).append(each)
    for _, together in sorted(levels.items()):
        steps = [each for each in together if isinstance(each, Step)]
        if steps:
            schedule.entries.append(steps)
        for each in together:
            if isinstance(each, Loop):
                _add_loop(each, schedule)


def _add_loop(loop: Loop, schedule: Schedule) -> None:
    begin = len(schedule.entries)
    place = len(schedule.loops)
    schedule.loops.append((begin, begin))
    _add(loop.test, schedule)
    leave = len(schedule.entries)
    schedule.entries.append(Jump(-1, loop.go_on))
    _add(loop.turn, schedule)
    if not loop.once:
        schedule.entries.append(Jump(begin))
    end = len(schedule.entries)
    schedule.entries[leave] = Jump(end, loop.go_on)
    schedule.loops[place] = (begin, end - 1)
