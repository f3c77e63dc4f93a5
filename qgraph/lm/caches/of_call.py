"""The caches of a call, each with its kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from ..programs.call import Step
from ..programs.form import types_of
from .kind import Kind, Needs
from .table import kind_of


class Caches:
    """mlx-lm's cache objects in the order of the model's layers, and how each is handed over.

    Attributes:
        items: mlx-lm's own list.
        kinds: one for each.
        unknown: names of classes that have no kind.
    """

    def __init__(self, items: Any, kinds: Sequence[Kind], unknown: str = "") -> None:
        self.items, self.kinds, self.unknown = items, kinds, unknown
        self._before: list[tuple[Any, dict[str, Any]]] = []

    @staticmethod
    def of(items: Sequence[Any] | None) -> Caches | None:
        if items is None:
            return None
        found = [kind_of(item) for item in items]
        kinds = [kind for kind in found if kind is not None]
        if len(kinds) == len(items):
            return Caches(items, kinds)
        lacking = {type(c).__name__ for k, c in zip(found, items, strict=True) if k is None}
        return Caches(items, (), ", ".join(sorted(lacking)))

    def _pairs(self) -> Any:
        return zip(self.kinds, self.items, strict=True)

    @property
    def pad(self) -> bool:
        return all(kind.pads(c) for kind, c in self._pairs())

    @property
    def end(self) -> bool:
        return any(kind.ends(c) for kind, c in self._pairs())

    @property
    def empty(self) -> bool:
        return all(kind.is_empty(c) for kind, c in self._pairs())

    def refusal(self, count: int) -> str:
        return next((why for kind, c in self._pairs() if (why := kind.refuses(c, count))), "")

    def shapes(self) -> list[Any]:
        return [kind.shapes(c) for kind, c in self._pairs()]

    def make_room(self, shapes: Sequence[Any], needs: Needs) -> None:
        """Make room for the tokens that come."""
        self._before = [(c, dict(vars(c))) for c in _single(self.items)]
        for (kind, c), like in zip(self._pairs(), shapes, strict=True):
            kind.make_room(c, like, needs)

    def take_back(self) -> None:
        """Make the caches what they were before room was made, where no program takes them.

        A model does more with zeros than with a state that is not there yet (mamba2 a sixth).
        """
        for c, things in self._before:
            vars(c).update(things)

    def fixed(self, count: int) -> tuple[tuple[Kind, Any], ...]:
        return tuple([(kind, kind.fixed(c, count)) for kind, c in self._pairs()])

    def types(self) -> tuple[Any, ...]:
        return tuple([types_of(kind.arrays(c)) for kind, c in self._pairs()])

    def arrays(self) -> list[mx.array]:
        found = [kind.arrays(c) for kind, c in self._pairs()]
        small = [kind.numbers(c) for kind, c in self._pairs()]
        return [a for some in (*found, *small) for a in some if isinstance(a, mx.array)]

    def room(self) -> int | None:
        left = [room for kind, c in self._pairs() if (room := kind.room(c)) is not None]
        return min(left, default=None)

    def settle(self) -> None:
        for kind, c in self._pairs():
            kind.settle(c)

    def hand_over(self) -> list[mx.array]:
        """The buffers, which the caches let go: a program then writes into them, and what anybody
        holds would be copied."""
        self._before = []
        found: list[mx.array] = []
        for kind, c in self._pairs():
            found += kind.arrays(c)
            kind.let_go(c)
        return found

    def put(
        self, kinds: Any, results: Sequence[mx.array], arrays: Sequence[Any], step: Step
    ) -> None:
        """Take back what `hand_over` gave, as it is after a call."""
        at = 0
        for (kind, fixed), some, c in zip(kinds, arrays, self.items, strict=True):
            kind.put(c, fixed, results[at : at + len(some)], step)
            at += len(some)


def _single(items: Sequence[Any]) -> Iterator[Any]:
    """Caches, and those in lists of caches."""
    for item in items:
        yield from _single(item.caches) if isinstance(item, CacheList) else (item,)
