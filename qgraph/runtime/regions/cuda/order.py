"""Launches of regions, one after the other.

Two of them at a time might each hold some of the multiprocessors and wait for the rest for ever.
MLX runs side by side what does not depend on one another, so each launch takes something that the
one before gave, within a program and from call to call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import mlx.core as mx

from ....kernels.compiled import Compiled
from .region import COUNTERS

Ordered = Callable[[list[mx.array], mx.array, mx.array], list[mx.array]]
"""Takes its arrays, the counters of the barrier and what the launch before gave; gives its results,
and last what its own last launch gave."""


class _Thread(threading.local):
    """Of each thread, as its stream is its own."""

    def __init__(self) -> None:
        self.counters = mx.zeros((COUNTERS,), mx.uint32)
        mx.eval(self.counters)
        self.last = self.counters


_thread: _Thread | None = None


class InOrder:
    """A compiled function whose regions are launched after those of the calls before."""

    def __init__(self, function: Ordered) -> None:
        def flat(*arrays: mx.array) -> list[mx.array]:
            *own, counters, last = arrays
            return function(own, counters, last)

        self._compiled = Compiled(flat)

    def call(self, *arrays: mx.array) -> Sequence[mx.array]:
        global _thread
        if _thread is None:
            _thread = _Thread()
        *results, _thread.last = self._compiled.call(*arrays, _thread.counters, _thread.last)
        return results
