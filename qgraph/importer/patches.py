"""What stands in MLX's place while a function is captured.

Three things are changed for the while, in `mlx.core` and on `mx.array`:

- every function of the table of ops notes where it was called (`Notes`), so that a primitive can
  show the user's line;
- what the export refuses but something else says as well is said that way (`contiguous`, `~x`);
- what the export refuses and nothing else says becomes a marker: a kernel that is never run, whose
  primitive the importer turns back into the op (`Markers`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ..ir.ops import ALIASES, OPS, RANDOM
from .markers import UNSAID, Markers
from .notes import Notes

_AT: Any = type(mx.zeros(1).at[0])
_IN_PLACE = ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow",
             "imatmul", "iand", "ior", "ixor", "ilshift", "irshift")  # fmt: skip
_OPERATORS = ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "matmul", "and",
              "or", "xor", "lshift", "rshift", "radd", "rsub", "rmul", "rtruediv", "rdiv",
              "rfloordiv", "rmod", "rpow", "eq", "ne", "lt", "le", "gt", "ge", "neg", "abs",
              "invert", "getitem")  # fmt: skip


class _Undecorated:
    """`mx.custom_function` while capturing: the function itself, its gradients left out."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def vjp(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    jvp = vmap = vjp


def _inverted(a: mx.array, **_: Any) -> mx.array:
    if a.dtype == mx.bool_:
        return mx.logical_not(a)
    return mx.bitwise_xor(a, mx.array(-1).astype(a.dtype))


_SAID: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (mx, "contiguous", lambda a, *_, **__: a),
    (mx, "bitwise_invert", _inverted),
    (mx.array, "__invert__", _inverted),
    (mx, "checkpoint", lambda function: function),
    (mx, "custom_function", _Undecorated),
)


def _place(op: str) -> tuple[Any, str]:
    *folders, name = op.split(".")
    owner: Any = mx
    for folder in folders:
        owner = getattr(owner, folder)
    return owner, name


def _noted() -> list[tuple[Any, str, bool]]:
    """Owner and name of everything that makes arrays, and whether it does so in place."""
    names = [name for name, op in OPS.items() if op.kind != "local"] + list(ALIASES)
    found = [(*_place(name), False) for name in names]
    found += [(mx.array, name, False) for name in dir(mx.array) if name in OPS or name in ALIASES]
    found += [(mx.array, f"__{name}__", False) for name in _OPERATORS]
    found += [(mx.array, f"__{name}__", True) for name in _IN_PLACE]
    found += [(_AT, name, False) for name in dir(_AT) if not name.startswith("_")]
    return [place for place in found if callable(vars(place[0]).get(place[1]))]


_NOTED = _noted()
_one_at_a_time = threading.RLock()
"""Two threads that put things in MLX's place would put back each other's."""


def _noting(function: Callable[..., Any], notes: Notes, in_place: bool) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        notes.note(result)
        return result

    def updated(array: mx.array, *args: Any) -> Any:
        notes.refuse_update(array)
        result = function(array, *args)
        notes.note(array)
        return result

    return updated if in_place else noted


def _drawing(op: str, function: Callable[..., Any], notes: Notes) -> Callable[..., Any]:
    signature = OPS[op].signature

    def drawn(*args: Any, stream: Any = None, **kwargs: Any) -> Any:
        on = {} if stream is None else {"stream": stream}
        result = function(*args, **kwargs, **on)
        notes.note(result)
        if signature.bind(*args, **kwargs).arguments.get("key") is None and notes.origins:
            notes.unkeyed.append(notes.origins[-1])
        return result

    return drawn


def _in_this_thread(function: Callable[..., Any], other: Any) -> Callable[..., Any]:
    """What this thread calls `function` for, and every other thread the `other`.

    A server may compute while a program is made in the background.
    """
    here = threading.get_ident()

    def either(*args: Any, **kwargs: Any) -> Any:
        call = function if threading.get_ident() == here else other
        return call(*args, **kwargs)

    return either


@contextmanager
def patched(notes: Notes | None, markers: Markers) -> Iterator[None]:
    """While this is open MLX is as the module says."""
    _one_at_a_time.acquire()
    originals: dict[tuple[Any, str], Any] = {}

    def put(owner: Any, name: str, function: Callable[..., Any]) -> None:
        original = originals.setdefault((owner, name), getattr(owner, name))
        setattr(owner, name, _in_this_thread(function, original))

    try:
        for owner, name, function in _SAID:
            put(owner, name, function)
        for op in UNSAID:
            owner, name = _place(op)
            put(owner, name, markers.replacing(op, getattr(owner, name)))
        method = markers.replacing("logcumsumexp", mx.array.logcumsumexp)
        put(mx.array, "logcumsumexp", method)
        if notes is not None:
            put(mx, "vmap", notes.vmap)
            for owner, name, in_place in _NOTED:
                put(owner, name, _noting(getattr(owner, name), notes, in_place))
            for op in RANDOM:
                owner, name = _place(op)
                put(owner, name, _drawing(op, originals[owner, name], notes))
        yield
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)
        _one_at_a_time.release()
