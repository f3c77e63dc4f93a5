"""How a class of mlx-lm's caches goes into a program and comes out of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..programs.call import Call, Step

LEAST = 256
"""Positions of the smallest buffer; mlx-lm's own grow by as many."""

SPARE = 4
"""A buffer so many times as long as one that would do is cut, where its length has a price."""

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


@dataclass(frozen=True)
class Needs:
    """What buffers are to hold in a call.

    Attributes:
        rows: of the batch.
        count: tokens a row that come.
        copied: does a call copy the buffers?  GPUs hold them for the call before; a buffer that is
            nearly empty, since most of it was trimmed, would then be paid for at each token.
    """

    rows: int
    count: int
    copied: bool = False

    def length(self, found: int, used: int, most: float = math.inf) -> int:
        """Positions for a buffer of `found`, `used` of them written: as it is, if programs take it.

        Args:
            most: the length of a ring; other buffers have none.

        >>> [Needs(1, 1, copied).length(16384, 150) for copied in (False, True)]
        [16384, 256]
        >>> Needs(1, 1).length(300, 150), Needs(1, 1, copied=True).length(512, 150)
        (256, 512)
        >>> Needs(1, 1).length(300, 150, most=300), Needs(1, 16).length(256, 250, most=300)
        (300, 300)
        """
        length = int(min(most, rounded(used + self.count)))
        taken = found == most or (found < most and is_rounded(found))
        spare = self.copied and found >= SPARE * length
        return found if taken and found >= length and not spare else length


class Kind(ABC):
    """A class of caches.  Outside of programs stand mlx-lm's objects, in a trace their views."""

    def __repr__(self) -> str:
        return type(self).__name__  # the same in each process

    def pads(self, cache: Any) -> bool:
        """May tokens follow a row's last one, to be forgotten?  A state would remember them."""
        return True

    @abstractmethod
    def fixed(self, cache: Any, count: int) -> Hashable:
        """What belongs to the program, for a call of `count` tokens."""

    @abstractmethod
    def numbers(self, cache: Any) -> Numbers: ...

    def slots(self, cache: Any) -> list[Hashable]:
        """What each of the numbers is: caches with the same are advanced alike."""
        return [(self, i) for i in range(len(self.numbers(cache)))]

    @abstractmethod
    def arrays(self, cache: Any) -> list[mx.array]:
        """What is handed over to the program, and comes back from it."""

    @abstractmethod
    def make_room(self, cache: Any, like: Any, needs: Needs) -> None:
        """Let the buffers hold so many tokens more, in a form that programs take.

        Args:
            like: what `shapes` gave of a cache that was used, for one that holds nothing.
        """

    def room(self, cache: Any) -> int | None:
        """Positions that are left in a buffer that can grow."""
        return None

    def refuses(self, cache: Any, count: int) -> str:
        """Why the model must take these tokens itself, or nothing."""
        return ""

    def settle(self, cache: Any) -> None:  # noqa: B027
        """What mlx-lm does to the buffers in a call, and a program does not: by default nothing."""

    @abstractmethod
    def shapes(self, cache: Any) -> Any:
        """Shapes and dtypes of the buffers of a cache that was used, but for rows and length."""

    @abstractmethod
    def is_empty(self, cache: Any) -> bool: ...

    @abstractmethod
    def let_go(self, cache: Any) -> None:
        """Forget the buffers, which a program has taken over."""

    @abstractmethod
    def view(
        self, fixed: Any, numbers: Sequence[mx.array], arrays: Sequence[mx.array], call: Call
    ) -> Any:
        """What the model sees in a trace."""

    @abstractmethod
    def results(self, view: Any) -> list[mx.array]:
        """The view's arrays after the call, in the order of `arrays`."""

    @abstractmethod
    def put(self, cache: Any, fixed: Any, arrays: Sequence[mx.array], step: Step) -> None:
        """Make a cache that let go what it is after a call."""

    @abstractmethod
    def content(self, cache: Any, until: mx.array | None = None) -> list[mx.array]:
        """What the cache remembers, in the order of time, in whatever form it is; to compare.

        Args:
            until: for each row after how many of its tokens there is but padding.
        """

    def can_go_back(self, cache: Any, count: int) -> bool:
        """Can the cache forget the last of `count` more tokens, the others staying as they are?"""
        return not self.ends(cache)

    def until(self, cache: Any) -> mx.array | None:
        """For each row of a prompt how many tokens there are, if the cache was told."""
        return None

    def ends(self, cache: Any) -> bool:
        """Do rows of this prompt end before its last token, as `prepare(lengths=…)` said?"""
        return False


def empty(
    like: Sequence[tuple[tuple[int, int], mx.Dtype]], rows: int, length: int
) -> list[mx.array]:
    """Buffers (rows, heads, length, dim) of zeros."""
    return [mx.zeros((rows, heads, length, dim), dtype) for (heads, dim), dtype in like]


def same_length(array: mx.array, length: int) -> mx.array:
    """Buffers (…, positions, dim) as long as that: with zeros at the end, or without their end."""
    found = array.shape[-2]
    if found == length:
        return array
    if found > length:
        return mx.contiguous(array[..., :length, :])
    more = mx.zeros((*array.shape[:-2], length - found, array.shape[-1]), array.dtype)
    return mx.concatenate([array, more], axis=-2)


def without_padding(
    array: mx.array, left_padding: mx.array, until: mx.array | None = None
) -> mx.array:
    """Buffers (rows, heads, positions, dim) with zeros where rows are padded."""
    first = left_padding.reshape(-1, 1, 1, 1)
    places = mx.arange(array.shape[2])[:, None]
    there = places >= first
    if until is not None:
        there = there & (places < first + until.reshape(-1, 1, 1, 1))
    return mx.where(there, array, mx.array(0, array.dtype))
