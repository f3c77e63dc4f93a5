"""Caches of a window as the model sees them in a trace.

A program keeps a ring: `max_size` positions, or fewer while they suffice, in which a new token
takes the oldest one's place.  mlx-lm's own take one token the same way; several they append, so
that each sees a whole window.  So does a view: the model sees the ring and the new tokens behind
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchRotatingKVCache, RotatingKVCache

from ..programs.call import Call


class Ring:
    """A view's keys and values.

    Attributes:
        seen: tokens so far, the ones that fell out included.
        at: where the next token goes.
        keep: first tokens that never fall out.
        wraps: may the tokens of this call reach beyond the ring's end?
    """

    def begin(
        self,
        arrays: Sequence[mx.array],
        numbers: Sequence[mx.array],
        call: Call,
        fixed: tuple[int, int, bool],
    ) -> None:
        (self.keys, self.values), (seen, at), self.call = arrays, numbers, call
        max_size, keep, wraps = fixed
        self.seen, self.at, self.wraps = seen, at, wraps
        self.max_size, self.keep = max_size, keep
        self.offset: Any = seen
        self.left_padding: mx.array | None = None

    @property
    def size(self) -> int:
        return int(self.keys.shape[2])

    def _age(self) -> mx.array:
        """How many tokens each place of the ring is behind the one that is written now."""
        return (self.at - mx.arange(self.size)) % self.size

    def _filled(self) -> mx.array:
        return mx.minimum(self.seen, self.size)

    def _order(self) -> mx.array:
        """For each place of the ring which it is in the order of time."""
        places = mx.arange(self.size)
        turned = self.keep + (places - self.at) % max(1, self.size - self.keep)
        turned = mx.where(places < self.keep, places, turned)
        return mx.where(self.seen < self.size, places, turned)

    def _dropped(self) -> mx.array:
        """A full ring lets one token go before several are seen behind it."""
        return (self.seen >= self.max_size).astype(mx.int32)

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False) -> Any:
        window = window_size or self.max_size
        if self.call.fresh:
            return self.call.first_mask(N, return_array, window, self.left_padding)
        if N == 1:
            return self._mask_of_one(window)
        if not self.wraps:
            limit = window if window < self.size else None
            return self.call.mask(self.seen, N, self.size, limit, self.left_padding)
        dropped, order = self._dropped(), self._order()
        first = self._filled() - dropped
        column = mx.where(order < self.keep, order, order - dropped)
        gone = (order >= self.keep) & (order < self.keep + dropped)
        there = (order < self._filled()) & ~gone
        columns = mx.concatenate([column, first + mx.arange(N)])
        there = mx.concatenate([there, mx.ones((N,), mx.bool_)])
        rows = (first + mx.arange(N))[:, None]
        seen = there & (columns <= rows) & (rows < columns + window)
        if self.left_padding is not None:
            left = (self.left_padding - dropped).reshape(-1, 1, 1, 1)
            seen = seen & (left <= columns)
        return self.call.finished(seen)

    def _mask_of_one(self, window: int) -> mx.array:
        seen = mx.arange(self.size)[None] <= self.seen
        if window < self.size:
            seen = seen & (self._age() < window)
        if self.left_padding is not None:
            last = mx.minimum(self.seen, self.max_size - 1)
            left = (self.left_padding - self._dropped()).reshape(-1, 1, 1, 1)
            seen = seen & (last - self._age() >= left)
        return self.call.finished(seen)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        count = keys.shape[2]
        if count > 1 and self.wraps:
            found = self._append(keys, values, count)
        else:
            start = self.at.reshape(1)
            self.keys = mx.slice_update(self.keys, keys, start, axes=(2,))
            self.values = mx.slice_update(self.values, values, start, axes=(2,))
            found = self.keys, self.values
        self._found = (keys, values) if self.call.fresh else found
        self.offset = self.offset + count
        return self._found

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        return self._found

    def _append(self, keys: mx.array, values: mx.array, count: int) -> tuple[mx.array, mx.array]:
        """The ring with the tokens behind it; the ring itself comes into the order of time."""
        size, keep, filled = self.size, self.keep, self._filled()
        both = (
            mx.concatenate([self.keys, keys], axis=2),
            mx.concatenate([self.values, values], axis=2),
        )
        left = mx.maximum(filled + self.call.valid - size, 0)
        places = mx.arange(size)
        which = mx.where(places < keep, places, places + left)
        turned = keep + (which + self.at - 2 * keep) % max(1, size - keep)
        old = mx.where((which < keep) | (self.seen < size), which, turned)
        source = mx.where(which < filled, old, size + which - filled)
        source = mx.minimum(source, size + count - 1)
        self.keys, self.values = (mx.take(a, source, axis=2) for a in both)
        return both


class RotatingView(Ring, RotatingKVCache):  # type: ignore[misc]
    pass


class BatchRotatingView(Ring, BatchRotatingKVCache):  # type: ignore[misc]
    pass
