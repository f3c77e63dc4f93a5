"""`mx.compile` that survives threads.

MLX keeps the traces of a compiled function in one cache a thread, under the function's address, and
a compiled function that is freed erases them from the cache of the thread that called it last
(mlx 0.32.4, `PyCompiledFun` in python/src/transforms.cpp).  After calls from two threads the other
cache keeps them, and the next function that Python puts at that address is answered with the
results of the dead one.  docs/decisions/0010 has the experiment.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .cuda.kernel import compiled_together

# A string among the arguments is part of the key of a trace, so this is nobody's call.
_PURGE = "qgraph: purge"


class OtherTypes(Exception):
    """A call of a compiled function with arguments that it was not made for."""


class Compiled(threading.local):
    """A compiled function: traced once a thread and set of input types.

    Each thread has a compiled function of its own, so that freeing it erases all its traces; and
    what others left under its address is erased before its first call.

    Args:
        function: takes arrays, returns a list of arrays.
        types: shapes and dtypes of its only arguments, or None if there are others.  Calls of them
            cost nothing more: MLX asks in Python for types that it has not met.

    Attributes:
        call: the calling thread's compiled function; raises OtherTypes.

    >>> import mlx.core as mx
    >>> Compiled(lambda x: [mx.exp(x) + 1]).call(mx.zeros(2))
    [array([2, 2], dtype=float32)]
    """

    def __init__(
        self, function: Callable[..., list[mx.array]], types: Sequence[Any] | None = None
    ) -> None:
        def traced(*arrays: mx.array | str) -> list[mx.array]:
            if arrays and arrays[0] is _PURGE:
                return []
            if types is not None and [_type(a) for a in arrays] != types:
                raise OtherTypes
            with compiled_together():
                return function(*arrays)

        mx.compile(traced)(_PURGE)  # freed at once, which erases all there is under its address
        self.call: Callable[..., list[mx.array]] = mx.compile(traced)


def _type(argument: object) -> Any:
    return (argument.shape, argument.dtype) if isinstance(argument, mx.array) else None


class Uncompiled:
    """A function that is called as it is, where MLX could not compile it."""

    def __init__(self, function: Callable[..., list[mx.array]]) -> None:
        self.call = compiled_together()(function)
