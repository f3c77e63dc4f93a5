"""What a trace knows of one call of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask


@dataclass(frozen=True)
class Call:
    """One call of a model: so many tokens a row, from positions that are arrays.

    Attributes:
        count: tokens a row, those that pad the row at its end included.
        valid: how many of them are no padding, int32 without axes.
        fresh: do the caches hold nothing yet?  Then attention reads the new keys alone.
        rank: axes that the model's masks must have.
        additive: does the model add its masks to the scores, where others choose by them?
    """

    count: int
    valid: mx.array
    fresh: bool = False
    rank: int = 2
    additive: bool = False

    def mask(
        self,
        first: mx.array,
        count: int,
        length: int,
        window: int | None = None,
        left_padding: mx.array | None = None,
    ) -> mx.array:
        """Which of `length` positions each of `count` tokens from position `first` on sees."""
        rows = (first + mx.arange(count))[:, None]
        columns = mx.arange(length)
        seen = columns <= rows
        if window is not None:
            seen = seen & (rows < columns + window)
        return self.finished(_padded(seen, columns, left_padding))

    def first_mask(
        self,
        count: int,
        array: bool = False,
        window: int | None = None,
        left_padding: mx.array | None = None,
    ) -> Any:
        """The mask of tokens that see one another alone; "causal" where that says all."""
        if window is not None and window >= count:
            window = None
        if not array and window is None and left_padding is None:
            return "causal"
        seen = create_causal_mask(count, window_size=window)
        return self.finished(_padded(seen, mx.arange(count), left_padding))

    def finished(self, seen: mx.array) -> mx.array:
        """A mask of truths in the form that the model takes."""
        while seen.ndim < self.rank:
            seen = seen[None]
        return mx.where(seen, 0.0, -float("inf")) if self.additive else seen


class Step:
    """What a call was, for the caches that come out of it.

    Attributes:
        valid, count: tokens a row, and with those that padded it.
    """

    def __init__(self, valid: int, count: int, leaders: dict[int, mx.array] | None = None) -> None:
        self.valid, self.count = valid, count
        self._leaders = leaders or {}
        self._sums: dict[tuple[int, int], mx.array] = {}

    def plus(self, array: mx.array, number: int) -> mx.array:
        """`array + number` as an array of its own; added once for all caches that hold the same.

        mlx-lm adds to such arrays in place, so no two caches may have one array.
        """
        leader = self._leaders.get(id(array), array)
        key = id(leader), number
        if key not in self._sums:
            self._sums[key] = leader + number
        return mx.stop_gradient(self._sums[key])


def _padded(seen: mx.array, columns: mx.array, left_padding: mx.array | None) -> mx.array:
    if left_padding is None:
        return seen
    return seen & (left_padding.reshape(-1, 1, 1, 1) <= columns)
