"""A region of a program, made ready: weights bound once, a call binds inputs and results."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ....ir.graph import Node, Value
from ....kernels.cpu.region import Region
from ....types import TensorType
from ..memory import Plan
from ..steps import Jump, Step
from ..taking import take_over
from .refs import DTYPES, h, ref
from .table import address, row_by_row
from .translate import encoded
from .translation import Translation, translate

_MEMORY = {"given": h.GIVEN, "fixed": h.FIXED, "arena": h.ARENA}


@dataclass(frozen=True)
class Phase:
    """A phase of a region.

    Attributes:
        place: of its time among the numbers of a run.
        steps: what it does.
        times: how often it comes in a run, as far as that is known.
    """

    place: int
    steps: tuple[Step, ...]
    times: int


class NativeRegion:
    """A region's node, ready to run: weights are bound, a call binds inputs and results.

    Args:
        node: the region.
        known: arrays that are the same at every call.
        threads: how many to use.

    Attributes:
        needs: the values whose arrays a call takes.

    Raises:
        Unknown: it holds what the engine does not know.
        RegionError: the engine refuses it.
        OSError, subprocess.CalledProcessError: the engine cannot be built.
    """

    def __init__(self, node: Node, known: Mapping[Value, mx.array], threads: int) -> None:
        body = node.bodies[0]
        pairs = list(zip(body.inputs, node.args["invariants"], strict=True))
        fixed = {inner: known[outer] for inner, outer in pairs if outer in known}
        self.needs = tuple(outer for _, outer in pairs if outer not in known)
        self.translation = translate(body, fixed)
        self.threads = threads
        self._region = _made(self.translation)
        made = {r.pointer for r in self.translation.results if r.made} | self.translation.over
        self._results = [
            (r.pointer, r.type.dtype, r.pointer not in made) for r in self.translation.results
        ]
        self._rooms = [_Room.of(r.type) for r in self.translation.results if r.made]
        types = {r.pointer: r.type for r in self.translation.results}
        over = [(i, _Room.of(types[i])) for i in sorted(self.translation.over)]
        self._small = [(i, room) for i, room in over if room.small]
        self._large = [i for i, room in over if not room.small]

    @property
    def steps(self) -> int:
        """How many numbers `nanoseconds` of a call has room for."""
        return int(self._region.steps)

    def phases(self) -> list[Phase]:
        """The phases in order."""
        found, place = [], 0
        schedule = self.translation.schedule
        for entry, times in zip(schedule.entries, schedule.times, strict=True):
            if isinstance(entry, Jump):
                place += 1
                continue
            found.append(Phase(place, tuple(entry), times))
            place += len(entry)
        return found

    @property
    def memory(self) -> Plan:
        """Bytes of the region's own, and of its largest cut."""
        return self.translation.plan

    def __call__(self, inputs: Sequence[mx.array], nanoseconds: Any = None) -> list[mx.array]:
        """The results for arrays of `needs`; see `take`."""
        return self.take(list(inputs), nanoseconds)

    def take(self, inputs: list[mx.array], nanoseconds: Any = None) -> list[mx.array]:
        """The results for arrays, which are written over where the list alone holds them; empties
        the list.

        What is written over is taken first: what else is read, such as the last token, may still be
        under way.

        Raises:
            RegionError: too little memory.
        """
        taken = self._taken(inputs)
        mx.eval(inputs)
        given: list[Any] = [_readable(array) for array in inputs]
        inputs.clear()
        for i, array in zip(self._large, taken, strict=True):
            given[i] = array
        copies = [(i, room.empty()) for i, room in self._small]
        made = [room.empty() for room in self._rooms]
        given += made
        fresh = [a for a in (*made, *(a for _, a in copies)) if isinstance(a, mx.array)]
        if fresh:
            mx.eval(fresh)
        for i, array in copies:
            _copy(given[i], array)
            given[i] = array
        self._region.run([address(a) for a in given], self.threads, nanoseconds)
        return [
            copy(given[pointer]) if came else _as_array(given[pointer], dtype)
            for pointer, dtype, came in self._results
        ]

    def _taken(self, inputs: list[mx.array]) -> list[mx.array]:
        """The large arrays among the inputs that are written over, in whose place nothing stays."""
        taken = [_readable(inputs[i]) for i in self._large]
        for i in self._large:
            inputs[i] = _NOTHING
        return take_over(taken) if taken else []


_NOTHING = mx.array(0)
SMALL = 1 << 16
"""Bytes up to which a result is written by NumPy and copied: MLX takes 11 microseconds to make an
array."""


@dataclass(frozen=True)
class _Room:
    """Where a result is written to."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    small: bool

    @staticmethod
    def of(type: TensorType) -> _Room:
        return _Room(type.shape, type.dtype, type.nbytes <= SMALL)

    def empty(self) -> Any:
        """An array of MLX, not evaluated, or of NumPy."""
        if self.small:
            return np.empty(self.shape, _NUMPY[self.dtype])
        return mx.empty(self.shape, self.dtype)


_NUMPY = {
    dtype: np.dtype("uint16" if dtype == mx.bfloat16 else str(dtype).partition(".core.")[2])
    for dtype in DTYPES
}
"""NumPy knows no bfloat16, but the bits will do."""


def _as_array(array: Any, dtype: mx.Dtype) -> mx.array:
    made: mx.array = array if isinstance(array, mx.array) else mx.array(array)
    return made if made.dtype == dtype else made.view(dtype)


def _readable(array: mx.array) -> mx.array:
    """The array, or a copy whose elements lie row by row."""
    buffer: Any = array
    return array if memoryview(buffer).c_contiguous else row_by_row(array)


def _copy(source: mx.array, goal: Any) -> None:
    start, end = address(_readable(source)), address(goal)
    if start is not None and end is not None:
        ctypes.memmove(end, start, source.nbytes)


def _made(translation: Translation) -> Region:
    args = bytearray()

    def place(struct: Any) -> int:
        at = len(args)
        args.extend(bytes(struct))
        args.extend(bytes(-len(args) % 8))
        return at

    entries = translation.schedule.entries
    begins: list[int] = []
    count = 0
    for entry in entries:
        begins.append(count)
        count += 1 if isinstance(entry, Jump) else len(entry)
    begins.append(count)
    steps = []
    for entry in entries:
        if isinstance(entry, Jump):
            jump = h.Jump(ref(entry.if_zero), begins[entry.target])
            steps.append(h.Step(h.JUMP, h.BARRIER, place(jump)))
            continue
        for i, step in enumerate(entry):
            flags = h.BARRIER if i == 0 else 0
            steps.append(h.Step(step.kind, flags, encoded(step, place)))
    buffers = [
        h.Buffer(_MEMORY[b.memory], 0, b.place or 0, b.nbytes) for b in translation.table.buffers
    ]
    return Region(
        buffers, steps, bytes(args), pointers=translation.pointers,
        arena_bytes=translation.plan.nbytes,
    )  # fmt: skip
