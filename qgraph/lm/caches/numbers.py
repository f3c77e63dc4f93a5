"""The numbers of a model's caches as inputs of a program: each once, whatever caches hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .kind import Kind


@dataclass(frozen=True)
class Pool:
    """What several caches hold in common.

    Attributes:
        values: the numbers, as arrays.
        places: for each cache, where in `values` its numbers are; belongs to the program.
        leaders: for arrays by identity, the one among `values` that holds the same.
    """

    values: list[mx.array]
    places: tuple[tuple[int, ...], ...]
    leaders: dict[int, mx.array]


class Numbers:
    """Makes pools, and remembers which arrays were found to be equal."""

    def __init__(self) -> None:
        self._equal: dict[tuple[int, int], tuple[mx.array, mx.array]] = {}

    def pool(self, kinds: Sequence[Kind], caches: Sequence[Any]) -> Pool:
        values: list[mx.array] = []
        found: dict[Any, int] = {}
        first: dict[Any, mx.array] = {}
        leaders: dict[int, mx.array] = {}
        places = []
        for kind, cache in zip(kinds, caches, strict=True):
            own = []
            for slot, number in zip(kind.slots(cache), kind.numbers(cache), strict=True):
                # Of one slot alone: that others are equal may hold for this call only.
                if isinstance(number, mx.array):
                    leader = first.setdefault(slot, number)
                    if self._same(leader, number):
                        leaders[id(number)] = number = leader
                    what: Any = slot, id(number)
                else:
                    what = slot, number
                if what not in found:
                    found[what] = len(values)
                    is_array = isinstance(number, mx.array)
                    values.append(number if is_array else mx.array(number, mx.int32))
                own.append(found[what])
            places.append(tuple(own))
        return Pool(values, tuple(places), leaders)

    def _same(self, a: mx.array, b: mx.array) -> bool:
        if a is b or (id(a), id(b)) in self._equal:
            return True
        return a.shape == b.shape and a.tolist() == b.tolist()

    def follow(self, pool: Pool, kinds: Sequence[Kind], caches: Sequence[Any]) -> None:
        """After a call: arrays that were one number of the pool were advanced alike."""
        self._equal = {}
        if not pool.leaders:
            return
        first: dict[Any, mx.array] = {}
        for kind, cache, places in zip(kinds, caches, pool.places, strict=True):
            numbers = zip(kind.slots(cache), kind.numbers(cache), places, strict=True)
            for slot, number, place in numbers:
                if isinstance(number, mx.array):
                    leader = first.setdefault((slot, place), number)
                    self._equal[id(leader), id(number)] = leader, number
