"""One arena for all buffers of a region, each in it as long as it is needed."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

from .arrays import Buffer
from .steps import Jump, Schedule, Step

ALIGNMENT = 64
"""Bytes; a line of the cache, so that no two threads write one."""


@dataclass(frozen=True)
class Plan:
    """Where buffers lie.

    Attributes:
        nbytes: size of the arena.
        cut: the most bytes that are needed at the same time: no arena can be smaller.
    """

    nbytes: int
    cut: int


@dataclass(frozen=True)
class Life:
    """The phases from which, and up to which, a buffer must be kept."""

    buffer: Buffer
    first: int
    last: int


def plan(schedule: Schedule) -> Plan:
    """Give each arena buffer its place: no two that live at the same time overlap.

    The buffer that begins first takes the smallest hole that it fits; near the largest cut for
    graphs whose values have like sizes.
    """
    lives = sorted(lifetimes(schedule), key=lambda life: (life.first, -life.buffer.nbytes))
    holes = _Holes()
    alive: list[Life] = []
    cut = nbytes = 0
    for life in lives:
        for ended in [other for other in alive if other.last < life.first]:
            alive.remove(ended)
            holes.free(ended.buffer.place, _rounded(ended.buffer.nbytes))
            nbytes -= _rounded(ended.buffer.nbytes)
        life.buffer.place = holes.take(_rounded(life.buffer.nbytes))
        alive.append(life)
        nbytes += _rounded(life.buffer.nbytes)
        cut = max(cut, nbytes)
    return Plan(holes.end, cut)


def lifetimes(schedule: Schedule) -> Iterable[Life]:
    """How long each arena buffer lives: over the whole of a loop if beyond a turn of it."""
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for at, entry in enumerate(schedule.entries):
        for buffer in touched(entry):
            if buffer.memory == "arena":
                first.setdefault(buffer, at)
                last[buffer] = at
    for begin, end in reversed(schedule.loops):  # inner ones first
        for buffer in first:
            if first[buffer] < begin <= last[buffer] <= end:
                last[buffer] = end
            elif begin <= first[buffer] <= end < last[buffer]:
                first[buffer] = begin
    return [Life(buffer, first[buffer], last[buffer]) for buffer in first]


def touched(entry: list[Step] | Jump) -> Iterable[Buffer]:
    """The buffers that a phase or a jump reads or writes."""
    if isinstance(entry, Jump):
        return () if entry.if_zero is None else (entry.if_zero.buffer,)
    return (b for step in entry for b in (*step.reads, *step.writes))


class _Holes:
    """Free pieces of a memory that grows at its end, in order and never side by side."""

    def __init__(self) -> None:
        self.end = 0
        self._starts: list[int] = []
        self._sizes: dict[int, int] = {}

    def take(self, size: int) -> int:
        fits = [s for s in self._starts if self._sizes[s] >= size]
        if fits:
            start = min(fits, key=self._sizes.__getitem__)
            left = self._remove(start) - size
            if left:
                self._add(start + size, left)
            return start
        start = self.end
        if self._starts and self._starts[-1] + self._sizes[self._starts[-1]] == self.end:
            start = self._starts[-1]  # the last hole grows
            self._remove(start)
        self.end = start + size
        return start

    def free(self, start: int, size: int) -> None:
        at = bisect.bisect(self._starts, start)
        if at < len(self._starts) and start + size == self._starts[at]:
            size += self._remove(self._starts[at])
        if at and self._starts[at - 1] + self._sizes[self._starts[at - 1]] == start:
            start = self._starts[at - 1]
            size += self._remove(start)
        self._add(start, size)

    def _add(self, start: int, size: int) -> None:
        if size:
            bisect.insort(self._starts, start)
            self._sizes[start] = size

    def _remove(self, start: int) -> int:
        self._starts.remove(start)
        return self._sizes.pop(start)


def _rounded(nbytes: int) -> int:
    return -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
