"""A body as phases over buffers: what a region does, before anything is bound to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from ....ir.graph import Graph, Value
from ....types import TensorType
from ..arrays import Array, Buffer
from ..memory import Plan, plan
from ..steps import Schedule, scheduled
from . import attention, convolution, indexing, loops, moves, products, rounding, rows  # noqa: F401  (they fill the table of kinds)
from .table import Table
from .translate import Translator


@dataclass(frozen=True)
class Result:
    """Where a result lies: in an array made for it, in an input written over, or as it came.

    Attributes:
        pointer: the number of its address among those given to a run.
        made: is the array made for it?
    """

    pointer: int
    made: bool
    type: TensorType


@dataclass(frozen=True)
class Translation:
    """A body as phases over buffers.

    Attributes:
        results: of the body, in order.
        pointers: how many addresses a run is given: of the inputs that are not fixed, in order,
            then of the arrays made for results.
        over: the inputs that are written over, by the numbers of their pointers.
    """

    table: Table
    schedule: Schedule
    plan: Plan
    results: tuple[Result, ...]
    pointers: int
    over: frozenset[int]


def translate(body: Graph, fixed: Mapping[Value, mx.array]) -> Translation:
    """The phases of a body; of `fixed` inputs the arrays are known.

    Raises:
        Unknown: it holds what the engine does not know.
    """
    mine = {v for v in body.inputs if v not in fixed}
    while True:
        made, spoiled = _translated(body, fixed, mine)
        if not spoiled:
            return made
        mine -= spoiled


def _translated(
    body: Graph, fixed: Mapping[Value, mx.array], mine: set[Value]
) -> tuple[Translation, set[Value]]:
    """The phases of a body that may write over the inputs `mine`; and those of them that it writes
    over without giving them back as a result, which a caller would find changed."""
    table = Table()
    given: dict[Value, Array] = {}
    free = [v for v in body.inputs if v not in fixed]
    for value in body.inputs:
        if value in fixed:
            given[value] = table.fixed(fixed[value])
            continue
        given[value] = table.array(value.shape, value.dtype, "given")
        given[value].buffer.place = free.index(value)
    t = Translator(body, table, given, mine)
    t.run()
    results, pointers = _results(t, body, given, len(free))
    schedule = scheduled(t.finish())
    over = {r.pointer for r, v in zip(results, body.outputs, strict=True)
            if not r.made and v not in given}  # fmt: skip
    spoiled = {v for i, v in enumerate(free) if t.wrote(given[v].buffer) and i not in over}
    made = Translation(
        table, schedule, plan(schedule), tuple(results), pointers, frozenset(over)
    )  # fmt: skip
    return made, spoiled & mine


def _results(
    t: Translator, body: Graph, given: Mapping[Value, Array], pointers: int
) -> tuple[list[Result], int]:
    """Each result in memory that is handed to a run, and how many pieces of it there are."""
    inputs = {a.buffer: v.type for v, a in given.items() if a.buffer.memory == "given"}
    taken: set[Buffer] = set()
    found = []
    for value in body.outputs:
        array = t.array(value)
        came = value in given and array.buffer in inputs
        over = inputs.get(array.buffer) == value.type and t.wrote(array.buffer)
        if came or (over and array.is_whole and array.buffer not in taken):
            found.append(Result(array.buffer.place, False, value.type))
            taken |= set() if came else {array.buffer}
            continue
        if array.buffer.memory != "arena" or not array.is_whole:
            array = t.copied(array)
        array.buffer.memory, array.buffer.place = "given", pointers
        found.append(Result(pointers, True, value.type))
        pointers += 1
    return found, pointers
