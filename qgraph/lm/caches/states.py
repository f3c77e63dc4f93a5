"""Caches of states, as models with convolutions and recurrences have, and lists of caches."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList

from ..programs.call import Call, Step
from ..programs.pieces import ON_CPU
from .kind import Kind, Needs, Numbers

_MORE = ("left_padding", "lengths")


class _Arrays(ArraysCache):
    pass


class ArraysKind(Kind):
    """`ArraysCache`: states that each token changes, zeros at the start."""

    def pads(self, cache: Any) -> bool:
        return False

    def ends(self, cache: Any) -> bool:
        return cache.lengths is not None

    def can_go_back(self, cache: Any, count: int) -> bool:
        return False

    def refuses(self, cache: Any, count: int) -> str:
        if self.ends(cache) and count not in ON_CPU.sizes:
            return "rows of several lengths, read into a state at once"
        return ""

    def fixed(self, cache: Any, count: int) -> tuple[bool, ...]:
        there = (a is not None for a in (*cache.cache, cache.left_padding, cache.lengths))
        return tuple(there)

    def numbers(self, cache: Any) -> Numbers:
        return ()

    def arrays(self, cache: Any) -> list[mx.array]:
        found = (*cache.cache, cache.left_padding, cache.lengths)
        return [a for a in found if a is not None]

    def is_empty(self, cache: Any) -> bool:
        return True  # says nothing of where the others stand

    def shapes(self, cache: Any) -> Any:
        return [None if a is None else (a.shape[1:], a.dtype) for a in cache.cache]

    def make_room(self, cache: Any, like: Any, needs: Needs) -> None:
        def state(array: mx.array | None, form: Any) -> mx.array | None:
            if array is not None or form is None:
                return array
            shape, dtype = form
            return mx.zeros((needs.rows, *shape), dtype)

        cache.cache = [state(*pair) for pair in zip(cache.cache, like, strict=True)]

    def view(
        self, fixed: Any, numbers: Sequence[mx.array], arrays: Sequence[mx.array], call: Call
    ) -> Any:
        view = _Arrays(len(fixed) - 2)
        self._fill(view, fixed, arrays)
        return view

    def _fill(self, cache: Any, there: Sequence[bool], arrays: Sequence[mx.array]) -> None:
        rest = iter(arrays)
        *states, cache.left_padding, cache.lengths = [next(rest) if t else None for t in there]
        cache.cache = states

    def results(self, view: Any) -> list[mx.array]:
        return self.arrays(view)

    def put(self, cache: Any, fixed: Any, arrays: Sequence[mx.array], step: Step) -> None:
        self._fill(cache, fixed, arrays)

    def let_go(self, cache: Any) -> None:
        cache.cache = [None] * len(cache.cache)
        cache.left_padding = cache.lengths = None

    def content(self, cache: Any, until: mx.array | None = None) -> list[mx.array]:
        return [a for a in cache.cache if a is not None]


class _List(CacheList):
    pass


class ListKind(Kind):
    """`CacheList`: each of its caches by its own kind."""

    def __init__(self, kind_of: Callable[[Any], Kind | None]) -> None:
        self._kind_of = kind_of

    def kinds(self, cache: Any) -> list[Kind]:
        found = [self._kind_of(c) for c in cache.caches]
        assert all(found)
        return [kind for kind in found if kind is not None]

    def pads(self, cache: Any) -> bool:
        return all(k.pads(c) for k, c in self._pairs(cache))

    def _pairs(self, cache: Any) -> list[tuple[Kind, Any]]:
        return list(zip(self.kinds(cache), cache.caches, strict=True))

    def fixed(self, cache: Any, count: int) -> Hashable:
        pairs = self._pairs(cache)
        return tuple((k, k.fixed(c, count), len(k.numbers(c)), len(k.arrays(c))) for k, c in pairs)

    def numbers(self, cache: Any) -> Numbers:
        return tuple(n for k, c in self._pairs(cache) for n in k.numbers(c))

    def slots(self, cache: Any) -> list[Hashable]:
        return [slot for k, c in self._pairs(cache) for slot in k.slots(c)]

    def arrays(self, cache: Any) -> list[mx.array]:
        return [a for k, c in self._pairs(cache) for a in k.arrays(c)]

    def until(self, cache: Any) -> mx.array | None:
        return next((u for k, c in self._pairs(cache) if (u := k.until(c)) is not None), None)

    def settle(self, cache: Any) -> None:
        for k, c in self._pairs(cache):
            k.settle(c)

    def is_empty(self, cache: Any) -> bool:
        return all(k.is_empty(c) for k, c in self._pairs(cache))

    def shapes(self, cache: Any) -> Any:
        return [k.shapes(c) for k, c in self._pairs(cache)]

    def make_room(self, cache: Any, like: Any, needs: Needs) -> None:
        likes = like or [None] * len(cache.caches)
        for (k, c), form in zip(self._pairs(cache), likes, strict=True):
            k.make_room(c, form, needs)

    def view(
        self, fixed: Any, numbers: Sequence[mx.array], arrays: Sequence[mx.array], call: Call
    ) -> Any:
        views, n, a = [], 0, 0
        for kind, inner, some, many in fixed:
            views.append(kind.view(inner, numbers[n : n + some], arrays[a : a + many], call))
            n, a = n + some, a + many
        view: Any = _List.__new__(_List)
        view.caches = tuple(views)
        view.parts = [kind for kind, *_ in fixed]
        return view

    def results(self, view: Any) -> list[mx.array]:
        return [a for k, v in zip(view.parts, view.caches, strict=True) for a in k.results(v)]

    def put(self, cache: Any, fixed: Any, arrays: Sequence[mx.array], step: Step) -> None:
        at = 0
        for (kind, of, _, many), c in zip(fixed, cache.caches, strict=True):
            kind.put(c, of, arrays[at : at + many], step)
            at += many

    def let_go(self, cache: Any) -> None:
        for k, c in self._pairs(cache):
            k.let_go(c)

    def content(self, cache: Any, until: mx.array | None = None) -> list[mx.array]:
        return [a for k, c in self._pairs(cache) for a in k.content(c, until)]

    def room(self, cache: Any) -> int | None:
        left = [room for k, c in self._pairs(cache) if (room := k.room(c)) is not None]
        return min(left, default=None)

    def refuses(self, cache: Any, count: int) -> str:
        return next((why for k, c in self._pairs(cache) if (why := k.refuses(c, count))), "")

    def can_go_back(self, cache: Any, count: int) -> bool:
        return all(k.can_go_back(c, count) for k, c in self._pairs(cache))

    def ends(self, cache: Any) -> bool:
        return any(k.ends(c) for k, c in self._pairs(cache))
