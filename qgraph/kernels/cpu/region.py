"""A region made ready: the engine's functions, called with its structs (`region.h`)."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx

from .header import header
from .library import library

_WORDS = 256


class RegionError(Exception):
    """A region that cannot be made or run, and why."""


class Region:
    """A table of buffers and a list of steps, as `region.h` has them.

    Args:
        buffers: `header().Buffer`s.
        steps: `header().Step`s.
        args: the bytes that the steps' arguments lie in.
        pointers: how many addresses a run is given.
        arena_bytes, private_bytes: sizes of the arenas that buffers lie in.

    Raises:
        RegionError: there is a mistake in it, or the engine cannot be built.
    """

    def __init__(
        self,
        buffers: Sequence[Any],
        steps: Sequence[Any],
        args: bytes,
        *,
        pointers: int,
        arena_bytes: int = 0,
        private_bytes: int = 0,
    ) -> None:
        h, functions = header(), _functions()
        table = (h.Buffer * len(buffers))(*buffers)
        listed = (h.Step * len(steps))(*steps)
        content = ctypes.create_string_buffer(args, len(args) or 1)
        given = h.Region(
            h.VERSION, len(buffers), len(steps), len(args), pointers, arena_bytes, private_bytes,
            ctypes.addressof(table), ctypes.addressof(listed), ctypes.addressof(content),
        )  # fmt: skip
        words = ctypes.create_string_buffer(_WORDS)
        self._handle = functions.qgraph_region_make(ctypes.byref(given), words, _WORDS)
        if not self._handle:
            raise RegionError(words.value.decode(errors="replace"))
        weakref.finalize(self, functions.qgraph_region_free, self._handle)
        self._run = functions.qgraph_region_run
        self.pointers, self.steps = pointers, len(steps)

    def run(self, addresses: Any, threads: int, nanoseconds: Any = None) -> None:
        """Run it on the arrays at `addresses`, one for each pointer.

        Args:
            addresses: numbers, or an array of `ctypes.c_void_p` that is kept from run to run.
            threads: how many, the caller's among them.
            nanoseconds: `(ctypes.c_int64 * steps)()`, to which the time of each phase is added at
                its first step.

        Raises:
            RegionError: there is too little memory.
        """
        if not isinstance(addresses, ctypes.Array):
            addresses = (ctypes.c_void_p * self.pointers)(*addresses)
        words = ctypes.create_string_buffer(_WORDS)
        if self._run(self._handle, addresses, threads, nanoseconds, words, _WORDS):
            raise RegionError(words.value.decode(errors="replace"))

    def memory(self, threads: int) -> int:
        """Bytes that a run takes beyond what it is given."""
        return int(_functions().qgraph_region_memory(self._handle, threads))


class Step(Region):
    """A region of one step, whose buffers are the arrays given to a run, in their order.

    Args:
        kind: such as `header().MATMUL`.
        args: its struct, where buffer i is the i-th array.
        sizes: bytes of the arrays.
    """

    def __init__(self, kind: int, args: Any, sizes: Sequence[int]) -> None:
        h = header()
        buffers = [h.Buffer(h.GIVEN, 0, i, size) for i, size in enumerate(sizes)]
        super().__init__(buffers, [h.Step(kind, 0, 0)], bytes(args), pointers=len(sizes))


@cache
def dtype_number(dtype: mx.Dtype) -> int:
    """A dtype as the header numbers it.

    >>> dtype_number(mx.bfloat16) == header().BF16
    True
    """
    name = str(dtype).removeprefix("mlx.core.")
    for long, short in (("bfloat", "BF"), ("float", "F"), ("uint", "U"), ("int", "I")):
        name = name.replace(long, short)
    return int(getattr(header(), name.upper()))


def _functions() -> Any:
    functions = library()
    if functions is None:
        raise RegionError("the CPU kernels could not be built")
    if functions.qgraph_region_make.restype is not ctypes.c_void_p:
        pointer: Any = ctypes.c_void_p
        words: list[Any] = [ctypes.c_char_p, ctypes.c_int64]
        functions.qgraph_region_run.argtypes = [pointer, pointer, ctypes.c_int, pointer, *words]
        functions.qgraph_region_memory.restype = ctypes.c_int64
        functions.qgraph_region_memory.argtypes = [pointer, ctypes.c_int]
        functions.qgraph_region_free.restype = None
        functions.qgraph_region_free.argtypes = [pointer]
        functions.qgraph_instructions.restype = ctypes.c_char_p
        functions.qgraph_region_make.argtypes = [pointer, *words]
        functions.qgraph_region_make.restype = pointer
    return functions


@cache
def multiplies_bytes() -> bool:
    """Has the processor an instruction for it, so that products of codes by codes are fast?"""
    return bool(_functions().qgraph_multiplies_bytes())


def instructions() -> str:
    """What the engine was built for: "avx512", "avx2", "neon" or "generic"."""
    return str(_functions().qgraph_instructions().decode())
