"""The weights of modules that a graph was made of: does somebody ask for their gradients?

A program holds them as they were.  `nn.value_and_grad` puts tracers in their places in the modules,
which a program does not read, so the gradients would be zero without a word.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from ..errors import TraceError
from ..ir.graph import Graph
from ..kernels.tracers import Tracers
from .constants import trace_constants


@dataclass(frozen=True, slots=True)
class Weight:
    """An array and where a module keeps it.

    Attributes:
        way: the attribute, and the keys from there into lists and dicts.
    """

    module: weakref.ref[Module]
    way: tuple[Any, ...]
    array: weakref.ref[mx.array]

    def now(self) -> Any:
        """What stands in its place; None if that is gone."""
        found: Any = self.module()
        try:
            for key in self.way:
                found = dict.get(found, key) if isinstance(found, dict) else found[key]
        except (IndexError, KeyError, TypeError):
            return None
        return found

    def __str__(self) -> str:
        return ".".join(map(str, (type(self.module()).__name__, *self.way)))


def note_read(module: Module, key: str, found: Any) -> None:
    """Called when the attribute `key` of a module was read: a trace remembers the weights in it."""
    known = trace_constants.get()
    if known is not None and type(key) is str and key[:1] != "_":
        for way, array in _arrays(found, (key,)):
            weight = Weight(weakref.ref(module), way, weakref.ref(array))
            known.weights[id(module), way] = weight


def note_all(module: Module) -> None:
    """The same for all that a module and those in it hold."""
    for _, inner in module.named_modules():  # type: ignore[no-untyped-call]
        for key, found in inner.items():
            note_read(inner, key, found)


def _arrays(thing: Any, way: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], mx.array]]:
    """The arrays that can have a gradient, in lists and dicts too; modules answer for their own."""
    if isinstance(thing, mx.array):
        if mx.issubdtype(thing.dtype, mx.inexact):
            yield way, thing
    elif isinstance(thing, dict) and not isinstance(thing, Module):
        for key, inner in thing.items():
            yield from _arrays(inner, (*way, key))
    elif isinstance(thing, list | tuple):
        for i, inner in enumerate(thing):
            yield from _arrays(inner, (*way, i))


def reading(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`Module.__getattr__` or `__getitem__` while a function is traced."""

    def read(module: Module, key: Any) -> Any:
        found = original(module, key)
        note_read(module, key, found)
        return found

    return read


class Watch:
    """Called before each call of a program of these graphs; their weights cost 0.3 us each.

    Raises:
        TraceError: a tracer stands in the place of a weight; names it.
    """

    def __init__(self, *graphs: Graph) -> None:
        self._weights: dict[Any, Weight] = {}
        self._tracers = Tracers()
        for graph in graphs:
            self.add(graph)

    def add(self, graph: Graph) -> None:
        self._weights.update(((id(w.module()), w.way), w) for w in graph.weights)

    def __call__(self) -> None:
        if not self._weights:
            return
        changed = [w for w in self._weights.values() if w.now() is not w.array()]
        changed = [w for w in changed if isinstance(w.now(), mx.array)]
        if not changed or not self._traced(*changed) or self._tracers.called_for([mx.array(0)]):
            return  # the latter without mx.compile
        raise TraceError(
            f"gradients are asked of {next(w for w in changed if self._traced(w))}, a constant of "
            "the program",
            hint="train what the program takes as an argument; freeze the module, or call it "
            "without a program",
        )

    def _traced(self, *weights: Weight) -> bool:
        return self._tracers.called_for([weight.now() for weight in weights])
