"""What `mx.array`'s operators do otherwise while a function is traced.

`array + tensor` makes a node as `tensor + array` does: MLX's operators raise on operands they do
not know instead of returning NotImplemented, so Python never asks the right-hand side.  Inside a
trace they are wrapped to ask it.  Those that change an array in place are noted, and so are views:
`x @ w.T` reads a transpose of the weight `w`, not a new array without a name.  Modules note
which of their weights are read (`weights`), and `mx.checkpoint` of tensors is the function itself.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from .constants import trace_constants
from .in_place import refuse_captured
from .tensor import Tensor, apply, has_tensor
from .weights import reading

_OPERATORS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"),
    *("lt", "le", "gt", "ge", "eq", "ne"),
)
_IN_PLACE = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"),
    *("lshift", "rshift"),
)
_VIEWS = ("transpose", "swapaxes", "moveaxis", "reshape", "flatten", "squeeze", "astype")
_TRANSPOSED = {"T": "transpose", "mT": "matrix_transpose"}
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


def _viewing(name: str, original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def method(array: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        result = original(array, *args, **kwargs)
        if (known := trace_constants.get()) is not None and not kwargs and result is not array:
            shape = name in ("reshape", "transpose") and args and isinstance(args[0], int)
            known.note_view(result, array, name, (args,) if shape else args)
        return result

    return method


def _indexed(original: Callable[[mx.array, Any], mx.array]) -> Callable[[mx.array, Any], Any]:
    def method(array: mx.array, index: Any) -> Any:
        if has_tensor(index):
            return apply("getitem", (array, index))
        result = original(array, index)
        if (known := trace_constants.get()) is not None and _is_plain(index):
            known.note_view(result, array, "getitem", (index,))
        return result

    return method


def _is_plain(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(part, int | slice | None) or part is ... for part in parts)


_properties = {name: vars(mx.array)[name] for name in _TRANSPOSED}
_methods = {name: getattr(mx.array, name) for name in _VIEWS}
_getitem = mx.array.__getitem__
_binary = {f"__{name}__": getattr(mx.array, f"__{name}__") for name in _OPERATORS}
_in_place = {
    name: getattr(mx.array, name) for name in ("__setitem__", *(f"__i{n}__" for n in _IN_PLACE))
}
_wrapped: dict[str, Any] = {
    **{name: _viewing(name, original) for name, original in _methods.items()},
    **{name: property(_viewing(op, _properties[name].fget)) for name, op in _TRANSPOSED.items()},
    "__getitem__": _indexed(_getitem),
    **{name: _asking(original) for name, original in _binary.items()},
    **{name: _noting(original) for name, original in _in_place.items()},
}
_originals = {**_binary, **_in_place, **_properties, **_methods, "__getitem__": _getitem}
_attribute = vars(Module)["__getattr__"]
_checkpoint = mx.checkpoint


def _checkpointed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`mx.checkpoint`; MLX's own ends the process where a function returns no arrays."""
    checkpointed = _checkpoint(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if has_tensor((args, kwargs)) else checkpointed)(*args, **kwargs)

    return call


_PLACES: list[tuple[Any, str, Any, Any]] = [
    *((mx.array, name, _originals[name], function) for name, function in _wrapped.items()),
    (Module, "__getattr__", _attribute, reading(_attribute)),
    (Module, "__getitem__", None, reading(dict.__getitem__)),  # a dict's, not its own
    (mx, "checkpoint", _checkpoint, _checkpointed),
]


def _install() -> None:
    for owner, name, _, function in _PLACES:
        setattr(owner, name, function)


def _restore() -> None:
    for owner, name, original, _ in _PLACES:
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


@contextmanager
def left_operands() -> Iterator[None]:
    """Open while a trace is on; MLX's own operators are back when the last trace ends."""
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            _install()
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _restore()
