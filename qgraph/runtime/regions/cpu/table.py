"""The buffers of a region, and where arrays lie."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..arrays import Array, Buffer, Memory, row_major
from .refs import dtype_number


@dataclass
class Table:
    """The buffers of a region, those of its loops' bodies too.

    Attributes:
        kept: arrays that fixed buffers point into.
    """

    buffers: list[Buffer] = field(default_factory=list)
    kept: list[mx.array] = field(default_factory=list)

    def buffer(self, nbytes: int, memory: Memory = "arena", place: int = 0) -> Buffer:
        made = Buffer(nbytes, memory, len(self.buffers), place)
        self.buffers.append(made)
        return made

    def array(self, shape: Sequence[int], dtype: mx.Dtype, memory: Memory = "arena") -> Array:
        """A new array, row by row."""
        dtype_number(dtype)
        size = 1
        for n in shape:
            size *= n
        return Array(self.buffer(size * dtype.size, memory), dtype, tuple(shape), row_major(shape))

    def fixed(self, array: mx.array) -> Array:
        """An array that stays the same."""
        array = row_by_row(array)
        self.kept.append(array)
        made = self.array(array.shape, array.dtype, "fixed")
        made.buffer.place = address(array) or 0
        return made


def address(array: Any) -> int | None:
    """Where an evaluated array, or one of NumPy, lies; None if it has no elements.

    Raises:
        TypeError: it does not lie row by row.
    """
    return ctypes.addressof(ctypes.c_char.from_buffer(array)) if array.size else None


def row_by_row(array: mx.array) -> mx.array:
    made = mx.contiguous(array)
    mx.eval(made)
    return made
