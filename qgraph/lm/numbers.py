"""The numbers of a model's caches as inputs of a program: each once, however many caches hold it."""

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
        self._equal: dict[tuple[int, int], mx.array] = {}
        self._held: list[mx.array] = []

    def pool(self, kinds: Sequence[Kind], caches: Sequence[Any]) -> Pool:
        values: list[mx.array] = []
        found: dict[Any, int] = {}
        first: dict[Any, mx.array] = {}
        leaders: dict[int, mx.array] = {}
        places = []
        for kind, cache in zip(kinds, caches, strict=True):
            own = []
            for slot, number in enumerate(kind.numbers(cache)):
                # Of one kind and slot alone: that others are equal holds for one call, not the next.
                what: Any = (kind, slot)
                if isinstance(number, mx.array):
                    leader = first.setdefault(what, number)
                    if self._same(leader, number):
                        leaders[id(number)] = number = leader
                    what = (*what, id(number))
                else:
                    what = (*what, number)
                if what not in found:
                    found[what] = len(values)
                    values.append(
                        number if isinstance(number, mx.array) else mx.array(number, mx.int32)
                    )
                own.append(found[what])
            places.append(tuple(own))
        return Pool(values, tuple(places), leaders)

    def _same(self, a: mx.array, b: mx.array) -> bool:
        if a is b or self._equal.get((id(a), id(b))) is b:
            return True
        return a.shape == b.shape and a.tolist() == b.tolist()

    def follow(self, kinds: Sequence[Kind], caches: Sequence[Any]) -> None:
        """After a call: arrays in one place of a pool were advanced alike, so they are still equal."""
        self._equal, first = {}, {}
        for kind, cache in zip(kinds, caches, strict=True):
            for slot, number in enumerate(kind.numbers(cache)):
                if isinstance(number, mx.array):
                    leader = first.setdefault((kind, slot), number)
                    self._equal[id(leader), id(number)] = number
