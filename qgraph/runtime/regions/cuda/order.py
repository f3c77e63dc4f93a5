"""Launches of regions, one after the other.

Two of them at a time might each hold some of the multiprocessors and wait for the rest for ever.
MLX runs side by side what does not depend on one another, so each launch takes something that the
one before gave, within a program and from call to call.  Threads have streams of their own, which
that does not order: while several call regions, a call ends before another thread's begins.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence

import mlx.core as mx

from ....kernels.compiled import Compiled
from .region import COUNTERS

Ordered = Callable[[list[mx.array], mx.array, mx.array], list[mx.array]]
"""Takes its arrays, the counters of the barrier and what the launch before gave; gives its results,
and last what its own last launch gave."""


class _Own:
    """What the launches of a thread hand on."""

    def __init__(self) -> None:
        self.counters = mx.zeros((COUNTERS,), mx.uint32)
        self.last = self.counters[:1]
        mx.eval(self.counters, self.last)


_thread = threading.local()
_threads: weakref.WeakSet[_Own] = weakref.WeakSet()
"""Those that have called regions and are not over."""
_turn = threading.Lock()


def _own() -> _Own:
    own: _Own | None = getattr(_thread, "own", None)
    if own is None:
        own = _thread.own = _Own()
        with _turn:
            _threads.add(own)
            if len(_threads) > 1:
                wait_for_device()  # others may have launches under way, and have not waited
    return own


def leave() -> None:
    """This thread has nothing under way, and calls no regions for now: others need not wait.

    For threads that never end, such as one that makes programs in the background.
    """
    own: _Own | None = getattr(_thread, "own", None)
    if own is not None:
        wait_for_device()
        with _turn:
            _threads.discard(own)
        _thread.own = None


def wait_for_device() -> None:
    """Until all that was sent to the GPU is done, by whichever thread."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    context = ctypes.c_void_p()
    if driver.cuInit(0) or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0):
        return
    driver.cuCtxPushCurrent_v2(context)
    driver.cuCtxSynchronize()
    driver.cuCtxPopCurrent_v2(ctypes.byref(context))
    driver.cuDevicePrimaryCtxRelease_v2(0)


class InOrder:
    """A compiled function whose regions are launched after those of the calls before."""

    def __init__(self, function: Ordered) -> None:
        def flat(*arrays: mx.array) -> list[mx.array]:
            *own, counters, last = arrays
            *results, last = function(own, counters, last)
            return [*results, last[:1]]  # of one type, whichever the last launch was

        self._compiled = Compiled(flat)

    def call(self, *arrays: mx.array) -> Sequence[mx.array]:
        own = _own()
        if len(_threads) == 1:
            return self._send(own, arrays)
        with _turn:
            results = self._send(own, arrays)
            mx.eval(results, own.last)
        return results

    def _send(self, own: _Own, arrays: Sequence[mx.array]) -> Sequence[mx.array]:
        *results, own.last = self._compiled.call(*arrays, own.counters, own.last)
        return results
