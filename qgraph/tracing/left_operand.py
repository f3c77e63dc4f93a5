"""What `mx.array`'s operators do otherwise while a function is traced.

`array + tensor` makes a node as `tensor + array` does: MLX's operators raise on operands they do
not know instead of returning NotImplemented, so Python never asks the right-hand side.  Inside a
trace they are wrapped to ask it.  And those that change an array in place are noted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from .in_place import refuse_captured
from .tensor import Tensor

_OPERATORS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"),
    *("lt", "le", "gt", "ge", "eq", "ne"),
)
_IN_PLACE = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"),
    *("lshift", "rshift"),
)
_lock = threading.Lock()
_depth = 0


def _asking(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def operator(left: Any, right: Any) -> Any:
        return NotImplemented if isinstance(right, Tensor) else original(left, right)

    return operator


def _noting(original: Callable[..., Any]) -> Callable[..., Any]:
    def operator(array: mx.array, *others: Any) -> Any:
        refuse_captured(array)
        return original(array, *others)

    return operator


_binary = {f"__{name}__": getattr(mx.array, f"__{name}__") for name in _OPERATORS}
_in_place = {
    name: getattr(mx.array, name) for name in ("__setitem__", *(f"__i{n}__" for n in _IN_PLACE))
}
_originals = {**_binary, **_in_place}
_wrapped = {
    **{name: _asking(original) for name, original in _binary.items()},
    **{name: _noting(original) for name, original in _in_place.items()},
}


def _install(functions: dict[str, Callable[..., Any]]) -> None:
    for name, function in functions.items():
        setattr(mx.array, name, function)


@contextmanager
def left_operands() -> Iterator[None]:
    """Open while a trace is on; MLX's own operators are back when the last trace ends."""
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            _install(_wrapped)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _install(_originals)
