"""Notes of where a function that is captured makes its arrays."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn

from ..errors import UnsupportedError
from ..origin import Origin, is_ours

_MLX = os.path.dirname(os.path.dirname(os.path.abspath(mlx.nn.__file__))) + os.sep
_stop_gradient, _vmap = mx.stop_gradient, mx.vmap
KEEP_IT = "pass it in as an argument, and return what becomes of it"


@dataclass
class Notes:
    """Arrays that the function made, and where it made them.

    Attributes:
        paths: of the modules whose calls are told apart, by their identity.
        captured: names of the arrays that the function sees as variables, by their identity.
        arrays: handed out of the captured function, so that MLX says which primitive made each.
        origins: for each array.
        unkeyed: where random numbers are drawn without a key.
    """

    paths: Mapping[int, str]
    captured: Mapping[int, str] = field(default_factory=dict)
    arrays: list[mx.array] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    unkeyed: list[Origin] = field(default_factory=list)
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

    def refuse_update(self, array: Any) -> None:
        """Refuse to update a captured array in place: its new value would be the capture's.

        Raises:
            UnsupportedError: the array is one that the function sees as a variable; names it.
        """
        if threading.get_ident() == self._thread and id(array) in self.captured:
            raise UnsupportedError(
                f"from_mlx: {self.captured[id(array)]}, which the function sees as a variable, is "
                "updated in place",
                hint=KEEP_IT,
            )

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
        while frame is not None and frame.f_code is not _OUTERMOST:
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


_OUTERMOST: Any = None


def walk_ends_at(function: Callable[..., Any]) -> None:
    """Say which function is called by the export: the walk over frames ends there."""
    global _OUTERMOST
    _OUTERMOST = function.__code__


@functools.cache
def _is_library(file: str) -> bool:
    return is_ours(file) or file.startswith((_MLX, "<"))
