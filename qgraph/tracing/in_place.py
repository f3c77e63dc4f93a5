"""What operators that change a tensor or an array in place may change while a function is traced.

`x += 1` and `x[0] = 1` change an `mx.array` for all who hold it, and a tensor likewise.  A function
is traced once and a body once for all its turns, so what was there before must not be changed: a
program would not do it again at each call, nor a loop at each turn.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

from ..errors import TraceError
from .constants import trace_constants


class Scope:
    """A function or a body that is being traced."""

    def __init__(self, what: str, outer: Scope | None) -> None:
        self.what, self.outer = what, outer
        self._captured: dict[int, weakref.ref[mx.array]] = {}

    def captures(self, array: mx.array) -> None:
        """Note an array that the function sees as a variable."""
        self._captured[id(array)] = weakref.ref(array)

    def captured(self, array: mx.array) -> bool:
        found = self._captured.get(id(array))
        known = found is not None and found() is array
        return known or (self.outer is not None and self.outer.captured(array))


own_scope: ContextVar[Scope | None] = ContextVar("own_scope", default=None)
"""The innermost function or body that is being traced; tensors know the one they were made in."""


@contextmanager
def scope(what: str) -> Iterator[None]:
    """Open while a function, or the body of a loop, is traced."""
    token = own_scope.set(Scope(what, own_scope.get()))
    try:
        yield
    finally:
        own_scope.reset(token)


def refuse_outer(made_in: Scope | None, what: Any) -> None:
    """Refuse to change what was made outside of the function or body that is being traced."""
    now = own_scope.get()
    if now is not None and made_in is not now:
        raise _refusal(f"a tensor ({what.type})", now)


def refuse_captured(array: mx.array) -> None:
    """Called before `array` changes in place: it becomes another constant from here on."""
    known, now = trace_constants.get(), own_scope.get()
    if known is None:
        return
    if now is not None and now.captured(array):
        raise _refusal(known.name_of(array) or "a captured array", now)
    known.changes(array)


def _refusal(what: str, now: Scope) -> TraceError:
    return TraceError(
        f"{what}, which was there before, is changed in place in {now.what}: that is traced once, "
        "so it would not happen at each call or turn",
        hint="write x = x + 1 for x += 1, and return what changes or carry it from turn to turn",
    )
