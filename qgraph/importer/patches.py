"""What stands in MLX's place while a function is recorded.

Three things are changed for the while, in `mlx.core` and on `mx.array`:

- every function of the table of ops notes where it was called (`Notes`), so that a primitive can
  show the user's line;
- what the export refuses but something else says as well is said that way (`contiguous`, `~x`);
- what the export refuses and nothing else says becomes a marker: a kernel that is never run, whose
  record the importer turns back into the op (`Markers`).
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn

from ..ops import ALIASES, OPS
from ..origin import Origin, is_ours
from ..tree import Tree, flatten

_MLX = os.path.dirname(os.path.dirname(os.path.abspath(mlx.nn.__file__))) + os.sep
_AT: Any = type(mx.zeros(1).at[0])
_IN_PLACE = ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow",
             "imatmul", "iand", "ior", "ixor", "ilshift", "irshift")  # fmt: skip
_OPERATORS = ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "matmul", "and",
              "or", "xor", "lshift", "rshift", "radd", "rsub", "rmul", "rtruediv", "rdiv",
              "rfloordiv", "rmod", "rpow", "eq", "ne", "lt", "le", "gt", "ge", "neg", "abs",
              "invert", "getitem")  # fmt: skip
_UNSAID = (
    "logcumsumexp", "segmented_mm", "to_fp8", "from_fp8", "qqmm", "gather_qqmm", "linalg.lu",
    "linalg.lu_factor", "linalg.solve", "linalg.det", "linalg.slogdet", "quantize", "dequantize",
)  # fmt: skip
_EXPORTED = {"quantize": ("affine",), "dequantize": ("affine", "mxfp4")}
"""Modes in which the op arrives as itself or as parts that a pass raises again."""
_MARK = "qgraph_marker"
_Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass
class Notes:
    """Arrays that the function made, and where it made them.

    Attributes:
        paths: of the modules whose calls are told apart, by their identity.
        arrays: handed out of the recorded function, so that MLX says which primitive made each.
        origins: for each array.
    """

    paths: Mapping[int, str]
    arrays: list[mx.array] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    _known: dict[tuple[str, int, str], Origin] = field(default_factory=dict)
    _thread: int = field(default_factory=threading.get_ident)
    _paused: int = 0

    def note(self, result: Any) -> None:
        """Keep where the arrays of `result` were made."""
        if self._paused or threading.get_ident() != self._thread:
            return
        found = result if isinstance(result, list | tuple) else (result,)
        arrays = [a for a in found if isinstance(a, mx.array)]
        if arrays:
            origin = self._here()
            # Another object, because the user's may be updated in place later.
            self.arrays += [_stop_gradient(a) for a in arrays]
            self.origins += [origin] * len(arrays)

    def vmap(self, fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """`mx.vmap`, inside of which arrays are not those of the function's graph."""
        mapped = _vmap(fun, *args, **kwargs)

        def call(*given: Any) -> Any:
            self._paused += 1
            try:
                result = mapped(*given)
            finally:
                self._paused -= 1
            self.note(result)
            return result

        return call

    def _here(self) -> Origin:
        """The innermost line that is neither MLX's nor ours, and the path of the module."""
        file, line, label = "", 0, ""
        frame: Any = sys._getframe(3)
        while frame is not None and frame.f_code is not _RECORDED:
            code = frame.f_code
            if not line and not _is_library(code.co_filename):
                file, line = code.co_filename, frame.f_lineno
            if not label and self.paths and code.co_argcount and code.co_varnames[0] == "self":
                label = self.paths.get(id(frame.f_locals.get("self")), "")
            if line and (label or not self.paths):
                break
            frame = frame.f_back
        key = (file, line, label)
        if key not in self._known:
            self._known[key] = Origin(file, line, label=label)
        return self._known[key]


_RECORDED: Any = None


def recorded(function: Callable[..., Any]) -> None:
    """Say which function is called by the export: the walk over frames ends there."""
    global _RECORDED
    _RECORDED = function.__code__


@functools.cache
def _is_library(file: str) -> bool:
    return is_ours(file) or file.startswith((_MLX, "<"))


@dataclass
class Marker:
    """A call of an op that MLX does not export.

    Attributes:
        form: of its arguments.
        leaves: what they hold; None stands for an array.
    """

    op: str
    form: Tree
    leaves: list[Any]
    stream: Any

    def arguments(self, arrays: Sequence[Any]) -> Any:
        """Positional and keyword arguments, with these in place of the arrays."""
        rest = iter(arrays)
        return self.form.build([next(rest) if x is None else x for x in self.leaves])


class Markers:
    """Calls that the export would refuse, carried through it by kernels that never run."""

    def __init__(self) -> None:
        self.calls: list[Marker] = []

    def replacing(self, op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, but as a marker."""

        def marked(*args: Any, stream: Any = None, **kwargs: Any) -> Any:
            if _mode(args, kwargs) in _EXPORTED.get(op, ()):
                return function(*args, **kwargs)
            stream = "cpu" if op.startswith("linalg.") else stream
            on = {} if stream is None else {"stream": mx.cpu if stream == "cpu" else stream}
            result = function(*args, **kwargs, **on)
            outputs = result if isinstance(result, list | tuple) else [result]
            leaves, form = flatten((args, kwargs), static=True)
            arrays = [leaf for leaf in leaves if isinstance(leaf, mx.array)]
            kept = [None if isinstance(leaf, mx.array) else leaf for leaf in leaves]
            kernel: Any = mx.fast.metal_kernel(
                name=f"{_MARK}_{len(self.calls)}_",
                input_names=[f"i{k}" for k in range(len(arrays))],
                output_names=[f"o{k}" for k in range(len(outputs))],
                source="",
            )
            self.calls.append(Marker(op, form, kept, stream))
            made = kernel(
                inputs=arrays,
                output_shapes=[a.shape for a in outputs],
                output_dtypes=[a.dtype for a in outputs],
                grid=(1, 1, 1),
                threadgroup=(1, 1, 1),
            )
            return type(result)(made) if isinstance(result, list | tuple) else made[0]

        return marked

    def of(self, kernel_name: str) -> Marker | None:
        """The call that the kernel of this name stands for."""
        _, mark, rest = kernel_name.partition(_MARK)
        return self.calls[int(rest.split("_")[1])] if mark else None


def _mode(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    named = [a for a in args if isinstance(a, str)]
    return kwargs.get("mode", named[0] if named else "affine")


class _Undecorated:
    """`mx.custom_function` while recording: the function itself, its gradients left out."""

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


_stop_gradient, _vmap = mx.stop_gradient, mx.vmap
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
        notes.note(args[0] if in_place else result)
        return result

    return noted


@contextmanager
def recording(notes: Notes | None, markers: Markers) -> Iterator[None]:
    """While this is open MLX is as the module says."""
    _one_at_a_time.acquire()
    originals: dict[tuple[Any, str], Any] = {}

    def put(owner: Any, name: str, function: Callable[..., Any]) -> None:
        originals.setdefault((owner, name), getattr(owner, name))
        setattr(owner, name, function)

    try:
        for owner, name, function in _SAID:
            put(owner, name, function)
        for op in _UNSAID:
            owner, name = _place(op)
            put(owner, name, markers.replacing(op, getattr(owner, name)))
        method = markers.replacing("logcumsumexp", mx.array.logcumsumexp)
        put(mx.array, "logcumsumexp", method)
        if notes is not None:
            put(mx, "vmap", notes.vmap)
            for owner, name, in_place in _NOTED:
                put(owner, name, _noting(getattr(owner, name), notes, in_place))
        yield
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)
        _one_at_a_time.release()
