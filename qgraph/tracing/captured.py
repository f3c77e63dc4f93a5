"""The arrays that a function sees besides its arguments: variables around it, and what they hold.

They are constants of its graph.  A program keeps them as they were when it was first compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from ..errors import InputError
from ..tree import flatten
from .constants import trace_constants
from .in_place import own_scope


def visible(fn: Callable[..., Any]) -> Iterator[tuple[str, str, mx.array]]:
    """A key, a name and the array, for each array in a variable that `fn` sees or in its object.

    An array is called after its variable, one in a dict or a module by its path in there.
    """
    if isinstance(fn, Module):
        yield from _inside(fn, "", "")
        return
    try:
        seen = inspect.getclosurevars(inspect.unwrap(fn))
    except (TypeError, ValueError):
        return
    found = [*seen.nonlocals.items(), *seen.globals.items()]
    found.append(("", getattr(fn, "__self__", None)))
    for name, thing in found:
        yield from _inside(thing, name, name)
        if not inspect.ismodule(thing):
            for attribute, inner in getattr(thing, "__dict__", {}).items():
                yield from _inside(inner, attribute, f"{name}.{attribute}")


def _inside(thing: Any, name: str, key: str) -> Iterator[tuple[str, str, mx.array]]:
    if isinstance(thing, mx.array | dict | list | tuple):
        leaves, form = flatten(thing)
        paths = form.paths("" if isinstance(thing, dict) else name)
        for leaf, path, whole in zip(leaves, paths, form.paths(key), strict=True):
            if isinstance(leaf, mx.array):
                yield whole, path, leaf


def name_captured(fn: Callable[..., Any]) -> None:
    """Name the arrays that `fn` can see, so that prints call them as the user does."""
    known, scope = trace_constants.get(), own_scope.get()
    assert known is not None
    for _, name, array in visible(fn):
        known.call(array, name)
        if scope is not None:
            scope.captures(array)


class Captured:
    """What a function saw when it was first traced: the same for all its traces."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        self._first: dict[str, mx.array] = {}

    def check(self) -> None:
        """Called before each trace.

        Raises:
            InputError: a variable holds another array than at the first trace; names it.
        """
        for key, _, array in visible(self._fn):
            private = any(part.startswith("_") for part in key.split("."))
            if not private and self._first.setdefault(key, array) is not array:
                raise InputError(
                    f"{key.strip('.')} is another array than when this program was first compiled",
                    hint="a program keeps the arrays that its function sees; make a new one, or "
                    "pass what changes as an argument",
                )
