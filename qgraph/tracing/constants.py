"""The constants of a trace: one for each array, with the elements it had when it was first used."""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx

from ..ir.graph import Value, constant_value
from ..origin import user_frame, variable_name


class View(NamedTuple):
    """An array that the traced function took of another: `w.T` is `transpose` of `w`.

    It keeps the source alive, and is forgotten with the array.
    """

    array: weakref.ref[mx.array]
    source: mx.array
    op: str
    args: tuple[Any, ...]


@dataclass
class Constants:
    """The constants of a trace by the identity of their arrays, and names for those to come.

    Attributes:
        weights: what was read of modules, by the module's identity and its way in there.
    """

    values: dict[int, tuple[mx.array, Value]] = field(default_factory=dict)
    names: dict[int, tuple[weakref.ref[mx.array], str]] = field(default_factory=dict)
    views: dict[int, View] = field(default_factory=dict)
    weights: dict[Any, Any] = field(default_factory=dict)

    def call(self, array: mx.array, name: str) -> None:
        """Name an array, unless it has a name."""
        if not self.name_of(array):
            self.names[id(array)] = weakref.ref(array), name

    def name_of(self, array: mx.array) -> str:
        """The name of an array, of this very one: another may have got its identity since."""
        ref, name = self.names.get(id(array), (None, ""))
        return name if ref is not None and ref() is array else ""

    def note_view(self, array: mx.array, source: mx.array, op: str, args: tuple[Any, ...]) -> None:
        """Remember what `array` is a view of, as long as it lives."""
        key, views = id(array), self.views
        ref = weakref.ref(array, lambda _: views.pop(key, None))
        views[key] = View(ref, source, op, args)

    def changes(self, array: mx.array) -> None:
        """Forget `array`, which changes in place: it is another constant from here on."""
        self.values.pop(id(array), None)
        self.views.pop(id(array), None)
        for key in [k for k, view in self.views.items() if view.source is array]:
            del self.views[key]


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
        name = name or known.name_of(array) or variable_name(array)
        constant = constant_value(copy(array), name, user_frame())
        known.values[id(array)] = (array, constant)
    return known.values[id(array)][1]


def view_of(array: mx.array) -> tuple[mx.array, str, tuple[Any, ...]] | None:
    """What the traced function took `array` of, by which op and with which arguments, if it did.

    As a node it keeps the name of its weight, is packed as that is, and once for all traces.
    """
    known = trace_constants.get()
    found = None if known is None else known.views.get(id(array))
    if found is None or found.array() is not array:
        return None
    return found.source, found.op, found.args
