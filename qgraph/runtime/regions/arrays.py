"""Values of a region as strided views of buffers, which views of a graph only rearrange."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import mlx.core as mx

Memory = Literal["given", "fixed", "arena"]
"""Handed to each run (inputs and results), known before (weights), or the region's own."""


@dataclass(eq=False)
class Buffer:
    """A piece of memory.

    Attributes:
        nbytes: its size.
        memory: where it lies.
        number: its place in the region's table.
        place: of a given one, the number of its pointer; of a fixed one, its address; in the arena,
            its offset, once that is planned.
        ready: the level of the last step that writes it so far; -1 before all steps.
    """

    nbytes: int
    memory: Memory
    number: int
    place: int = 0
    ready: int = -1


@dataclass(frozen=True, eq=False)
class Array:
    """A value: a view of a buffer.  Strides count elements, the offset counts bytes."""

    buffer: Buffer
    dtype: mx.Dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = field(default=0)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of its elements, whatever they lie between."""
        return self.size * self.dtype.size

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Do its elements lie row by row without gaps?"""
        return self.size <= 1 or same_places(self.shape, self.strides, row_major(self.shape))

    @property
    def is_whole(self) -> bool:
        """Is it all of its buffer, row by row?"""
        return self.offset == 0 and self.nbytes == self.buffer.nbytes and self.is_contiguous

    def moved(self, elements: int) -> Array:
        return replace(self, offset=self.offset + elements * self.dtype.size)

    def transposed(self, axes: Sequence[int]) -> Array:
        return replace(
            self,
            shape=tuple(self.shape[a] for a in axes),
            strides=tuple(self.strides[a] for a in axes),
        )

    def sliced(self, axis: int, start: int, length: int, step: int = 1) -> Array:
        shape, strides = list(self.shape), list(self.strides)
        moved = self.moved(start * strides[axis]) if length else self
        shape[axis], strides[axis] = length, strides[axis] * step
        return replace(moved, shape=tuple(shape), strides=tuple(strides))

    def without(self, axis: int) -> Array:
        """Its first element along an axis, without the axis."""
        shape, strides = list(self.shape), list(self.strides)
        del shape[axis], strides[axis]
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def broadcast(self, shape: Sequence[int]) -> Array:
        lead = len(shape) - self.ndim
        own = zip(self.shape, self.strides, shape[lead:], strict=True)
        strides = [0] * lead + [0 if size != wanted else stride for size, stride, wanted in own]
        return replace(self, shape=tuple(shape), strides=tuple(strides))

    def reshaped(self, shape: Sequence[int]) -> Array | None:
        """A view of another shape, or None where its elements would have to move."""
        strides = reshaped_strides(self.shape, self.strides, shape)
        if strides is None:
            return None
        return replace(self, shape=tuple(shape), strides=strides)

    def rows(self, axis: int = -1) -> tuple[int, int] | None:
        """How many rows along the last axis and their distance, if one distance will do."""
        flat = self.reshaped((self.size // max(1, self.shape[axis]), self.shape[axis]))
        return None if flat is None else (flat.shape[0], flat.strides[0])


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def same_places(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Do two lists of strides reach the same elements?  Those of axes of one element do nothing."""
    return all(size == 1 or x == y for size, x, y in zip(shape, a, b, strict=True))


def reshaped_strides(
    shape: Sequence[int], strides: Sequence[int], wanted: Sequence[int]
) -> tuple[int, ...] | None:
    """Strides of a view of another shape, or None.

    >>> reshaped_strides((2, 3, 4), (12, 4, 1), (6, 4)), reshaped_strides((3, 4), (1, 3), (12,))
    ((4, 1), None)
    """
    if math.prod(shape) == 0:
        return row_major(wanted)
    old = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    result: list[int] = []
    i = 0
    left = list(wanted)
    while left:
        size = left.pop(0)
        sizes = [size]
        if size == 1:
            result.append(1)
            continue
        count, stride = old[i]
        i += 1
        while count != math.prod(sizes):
            if count < math.prod(sizes):
                more, inner = old[i]
                if stride != inner * more:  # they do not follow one another
                    return None
                count, stride, i = count * more, inner, i + 1
            else:
                sizes.append(left.pop(0))
        steps = row_major(sizes)
        result += [step * stride for step in steps]
    return tuple(result)


def merged(
    shape: Sequence[int], operands: Sequence[Sequence[int]]
) -> tuple[list[int], list[list[int]]]:
    """The fewest axes that reach the same elements in the same order for all operands' strides.

    >>> merged((2, 3, 1, 4), [(12, 4, 4, 1), (0, 0, 0, 1)])
    ([6, 4], [[4, 1], [0, 1]])
    """
    sizes: list[int] = []
    found: list[list[int]] = [[] for _ in operands]
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        joins = bool(sizes) and all(
            strides[-1] == operand[axis] * size
            for strides, operand in zip(found, operands, strict=True)
        )
        if joins:
            sizes[-1] *= size
        else:
            sizes.append(size)
        for strides, operand in zip(found, operands, strict=True):
            if joins:
                strides[-1] = operand[axis]
            else:
                strides.append(operand[axis])
    return sizes or [1], [strides or [1] for strides in found]
