"""How a class of mlx-lm's caches goes into a program and comes out of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import mlx.core as mx

from .call import Call, Step

LEAST = 256
"""Positions of the smallest buffer; mlx-lm's own grow by as many."""

Numbers = tuple[Any, ...]
"""What of a cache changes from call to call and is small: integers, and arrays of one a row."""


def rounded(length: int) -> int:
    """The buffer for so many positions: powers of two, so that few programs serve all.

    >>> [rounded(n) for n in (1, 256, 257, 5000)]
    [256, 256, 512, 8192]
    """
    return max(LEAST, 1 << (length - 1).bit_length())


def is_rounded(length: int) -> bool:
    return length >= LEAST and length & (length - 1) == 0


class Kind(ABC):
    """A class of caches.  Outside of programs stand mlx-lm's objects, in a trace their views."""

    pads = True
    """May tokens follow a row's last one, to be forgotten?  What has a state would read them."""

    @abstractmethod
    def fixed(self, cache: Any, count: int) -> Hashable:
        """What belongs to the program, for a call of `count` tokens."""

    @abstractmethod
    def numbers(self, cache: Any) -> Numbers: ...

    @abstractmethod
    def arrays(self, cache: Any) -> list[mx.array]:
        """What is handed over to the program, and comes back from it."""

    @abstractmethod
    def make_room(self, cache: Any, like: Any, rows: int, count: int) -> None:
        """Let the buffers hold `count` tokens more, in a form that programs take.

        Args:
            like: what `shapes` gave of a cache that was used, for one that holds nothing.
            rows: of the batch.
        """

    @abstractmethod
    def shapes(self, cache: Any) -> Any:
        """Shapes and dtypes of the buffers of a cache that was used, but for rows and length."""

    @abstractmethod
    def is_empty(self, cache: Any) -> bool: ...

    @abstractmethod
    def view(
        self, fixed: Any, numbers: Sequence[mx.array], arrays: Sequence[mx.array], call: Call
    ) -> Any:
        """What the model sees in a trace."""

    @abstractmethod
    def results(self, view: Any) -> list[mx.array]:
        """The view's arrays after the call, in the order of `arrays`."""

    @abstractmethod
    def put(self, cache: Any, arrays: Sequence[mx.array], step: Step) -> None:
        """Make the cache what it is after a call."""

    @abstractmethod
    def content(self, cache: Any) -> list[mx.array]:
        """What the cache remembers, in the order of time, in whatever form it is; to compare."""

    def refuses(self, cache: Any, count: int) -> str:
        """Why a call of so many tokens must be left to the model, or nothing."""
        return ""


def same_length(array: mx.array, length: int) -> mx.array:
    """Buffers (…, positions, dim) with zeros at the end, or without what is there, up to `length`."""
    found = array.shape[-2]
    if found == length:
        return array
    if found > length:
        return mx.contiguous(array[..., :length, :])
    more = mx.zeros((*array.shape[:-2], length - found, array.shape[-1]), array.dtype)
    return mx.concatenate([array, more], axis=-2)


def without_padding(array: mx.array, left_padding: mx.array) -> mx.array:
    """Buffers (rows, heads, positions, dim) with zeros where rows are padded on the left."""
    there = mx.arange(array.shape[2])[:, None] >= left_padding.reshape(-1, 1, 1, 1)
    return mx.where(there, array, mx.array(0, array.dtype))
