"""On CUDA a token copies no caches: they stay as they are, and new rows go to tails beside them.

To write into a cache is to copy it, as the GPU still holds it for the token before.  So programs
take tails too (`tail-states`).  What mlx-lm's objects hold meanwhile is a cache with its tail
merged, which is computed where somebody asks for it or the tail is full.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx

from ...ir.graph import Graph, Value
from ...runtime.executable import Executable
from ...target import Target
from .form import Form

ROWS = 32
"""Of a tail: with each token all of it is copied, and when it is full the caches once."""


LONG = sys.maxsize
"""Positions of a buffer beyond which tails are taken: none for now.  In buffers of 256 a token of
Llama-8B's shape took 4.2 ms with them and 2.8 with copies (one H100), as more arrays cost the host
more; beyond 4,096 they should win, which was not measured yet (decision 0036)."""


def rows_for(target: Target, form: Form) -> int:
    """Rows of the tails that a program takes; 0 where it takes none."""
    alone = target.backend == "cuda" and target.mesh is None and form.count == 1
    return ROWS if alone and form.length > LONG else 0


@dataclass(frozen=True)
class _Beside:
    """What stands beside the caches of a call.

    Attributes:
        now: what mlx-lm's objects were given.
        before: the caches when the tails were empty.
        tails: keys and values, then positions.
        used: rows of each.
    """

    now: list[mx.array]
    before: list[mx.array]
    tails: list[mx.array]
    used: int


class Tails:
    """The tails of one program, by the caches that it was called with.

    Args:
        graph: of a program that takes tails.
        own: how many of its inputs are none.
    """

    def __init__(self, graph: Graph, own: int) -> None:
        names = [v.node.args["name"] for v in graph.inputs]
        beside = {name.removeprefix("tail.") for name in names[own:]}
        self._caches = [i for i, name in enumerate(names[:own]) if name in beside]
        self._results = len(graph.outputs) - (len(names) - own)
        self._more = self._results - own  # numbers of results that inputs become, less their own
        self._empty = [_nothing(v) for v in graph.inputs[own:]]
        self._rows = min(a.size for a in self._empty if a.ndim == 1)
        self._of: WeakKeyDictionary[Any, _Beside] = WeakKeyDictionary()
        mx.eval(self._empty)

    def __len__(self) -> int:
        """The caches that there are tails of."""
        return len(self._of)

    def take(self, executable: Executable, cache: Any, arrays: list[mx.array]) -> list[mx.array]:
        """What the program gives for its own inputs, which it may write over; empties the list.

        Args:
            cache: the first of mlx-lm's objects, by which a call's caches are known.
        """
        now = [arrays[i] for i in self._caches]
        beside = self._of.pop(cache, None)
        if beside is None or beside.used == self._rows or not _same(now, beside.now):
            beside = _Beside(now, now, self._empty, 0)
        for i, before in zip(self._caches, beside.before, strict=True):
            arrays[i] = before
        arrays += beside.tails
        found = executable.take(arrays)
        results, tails = found[: self._results], found[self._results :]
        after = [copy(results[i + self._more]) for i in self._caches]
        self._of[cache] = _Beside(after, beside.before, tails, beside.used + 1)
        return results


def _nothing(tail: Value) -> mx.array:
    """A tail that is not used: no row has a position."""
    return mx.full(tail.shape, -1 if tail.ndim == 1 else 0, tail.dtype)


def _same(some: Sequence[mx.array], others: Sequence[mx.array]) -> bool:
    """Are they the same arrays, and as they were?  MLX's hash is another after `a[0] = 1`, which
    `is` would not tell."""
    return list(map(hash, some)) == list(map(hash, others))
