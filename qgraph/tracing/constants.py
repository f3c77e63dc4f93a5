"""The constants of a trace: one for each array, with the elements it had when it was first used."""

from __future__ import annotations

from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field

import mlx.core as mx

from ..ir.graph import Value, constant_value
from ..origin import user_frame, variable_name


@dataclass
class Constants:
    """The constants of a trace by the identity of their arrays, and names for those to come."""

    values: dict[int, tuple[mx.array, Value]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)


trace_constants: ContextVar[Constants | None] = ContextVar("trace_constants", default=None)
"""Set while a function is traced, so that each array it uses is one node."""


def constant_for(array: mx.array, name: str = "") -> Value:
    """The constant for `array`: one node for each array of a trace.

    It is another array over the same buffer, neither copied nor evaluated, so that `array += 1`
    and `array[0] = 1`, which change an `mx.array` in place, do not change the constant.
    """
    known = trace_constants.get()
    if known is None:
        return constant_value(copy(array), name, user_frame())
    if id(array) not in known.values:
        name = name or known.names.get(id(array)) or variable_name(array)
        constant = constant_value(copy(array), name, user_frame())
        known.values[id(array)] = (array, constant)
    return known.values[id(array)][1]
