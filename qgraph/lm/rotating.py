"""Caches of a window: what is older than the window makes room for what is new.

A program keeps a ring: `max_size` positions, or fewer while they suffice, in which a new token
takes the oldest one's place.  mlx-lm's own take one token the same way; several they append, so
that each sees a whole window.  So does a view: the model sees the ring and the new tokens behind
it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchRotatingKVCache, RotatingKVCache, dynamic_roll

from .call import Call, Step
from .filled import FilledKind
from .kind import Numbers, is_rounded, rounded, same_length, without_padding


class Ring:
    """A view's keys and values.

    Attributes:
        seen: tokens so far, the ones that fell out included.
        at: where the next token goes.
        keep: first tokens that never fall out.
        wraps: may the tokens of this call reach beyond the ring's end?
    """

    def _begin(
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


class _Rotating(Ring, RotatingKVCache):  # type: ignore[misc]
    pass


class _BatchRotating(Ring, BatchRotatingKVCache):  # type: ignore[misc]
    pass


class RotatingKind(FilledKind):
    """`RotatingKVCache`."""

    def keep(self, cache: Any) -> int:
        return int(cache.keep)

    def seen(self, cache: Any) -> int:
        return int(cache.offset)

    def fixed(self, cache: Any, count: int) -> tuple[int, int, bool]:
        wraps = count > 1 and self.seen(cache) + count > cache.keys.shape[2]
        return int(cache.max_size), self.keep(cache), wraps

    def numbers(self, cache: Any) -> Numbers:
        return self.seen(cache), self._at(cache)

    def slots(self, cache: Any) -> list[Hashable]:
        return [(cache.max_size, slot) for slot in super().slots(cache)]

    def can_go_back(self, cache: Any, count: int) -> bool:
        return not self.ends(cache) and self.seen(cache) + count < cache.max_size

    def _at(self, cache: Any) -> int:
        return self.keep(cache) if cache._idx == cache.max_size else int(cache._idx)

    def room(self, cache: Any) -> int | None:
        size = cache.keys.shape[2]
        return None if size == cache.max_size else int(size) - self.seen(cache)

    def is_empty(self, cache: Any) -> bool:
        return self.seen(cache) == 0

    def make_room(self, cache: Any, like: Any, rows: int, count: int) -> None:
        most = cache.max_size
        length = min(most, rounded(self.seen(cache) + count))
        if cache.keys is None:
            made = [mx.zeros((rows, heads, length, dim), dtype) for (heads, dim), dtype in like]
            self._set(cache, made)
            cache._idx = 0
            return
        found = cache.keys.shape[2]
        if found == most or (length <= found < most and is_rounded(found)):
            return
        arrays = self._in_order(cache)
        used = arrays[0].shape[2]
        if used > most:
            keep = self.keep(cache)
            arrays = [
                mx.concatenate([a[..., :keep, :], a[..., used - most + keep :, :]], axis=2)
                for a in arrays
            ]
        self._cut(cache, max(0, used - most), Step(1, 1))
        cache._idx = min(used, most)
        self._set(cache, [same_length(a, length) for a in arrays])

    def _in_order(self, cache: Any) -> list[mx.array]:
        return [cache._temporal_order(a) for a in self.arrays(cache)]

    def _cut(self, cache: Any, count: int, step: Step) -> None:
        """So many of the oldest were let go."""

    def content(self, cache: Any, until: mx.array | None = None) -> list[mx.array]:
        arrays, keep = self._in_order(cache), self.keep(cache)
        used = arrays[0].shape[2]
        last = min(used, cache.max_size) - keep
        return [a for b in arrays for a in (b[..., :keep, :], b[..., max(keep, used - last) :, :])]

    def view(
        self, fixed: Any, numbers: Sequence[mx.array], arrays: Sequence[mx.array], call: Call
    ) -> Any:
        view = _Rotating.__new__(_Rotating)
        view._begin(arrays, numbers, call, fixed)
        return view

    def put(self, cache: Any, fixed: Any, arrays: Sequence[mx.array], step: Step) -> None:
        _, _, wraps = fixed
        seen, size = self.seen(cache), arrays[0].shape[2]
        if wraps:
            filled = min(seen, size) + step.valid
            cache._idx, gone = min(filled, size), max(0, filled - size)
        else:
            cache._idx = self._at(cache) + step.valid
            gone = int(step.count == 1 and seen >= cache.max_size)
        self._cut(cache, gone, step)
        self._set(cache, arrays)
        self._count(cache, step)

    def _count(self, cache: Any, step: Step) -> None:
        cache.offset += step.valid


class BatchRotatingKind(RotatingKind):
    """`BatchRotatingKVCache`: rows padded on the left, each with an offset of its own."""

    def keep(self, cache: Any) -> int:
        return 0

    def seen(self, cache: Any) -> int:
        return int(cache._offset)

    def numbers(self, cache: Any) -> Numbers:
        return *super().numbers(cache), cache.offset, cache.left_padding

    def ends(self, cache: Any) -> bool:
        return cache._lengths is not None

    def refuses(self, cache: Any, count: int) -> str:
        # mlx-lm holds all of them until `finalize`: what pads a row must not take its place.
        if self.ends(cache) and self.seen(cache) + count > cache.max_size:
            return "rows of several lengths, longer than a window, at once"
        return ""

    def settle(self, cache: Any) -> None:
        """Move rows that have ended to the right: what pads them then evicts nothing."""
        if cache._lengths is None or not self.seen(cache):
            return
        over = mx.maximum(0, cache.offset - cache._lengths)
        length = cache.keys.shape[2]
        roll: Any = dynamic_roll
        rolled = [roll(a, over[:, None], axis=2) for a in self._in_order(cache)]
        self._set(cache, [same_length(a, length) for a in rolled])
        cache._idx = rolled[0].shape[2]
        cache.left_padding = cache.left_padding + over
        cache.offset = cache.offset - over

    def _in_order(self, cache: Any) -> list[mx.array]:
        cache._temporal_order()
        return [a[..., : cache._idx, :] for a in self.arrays(cache)]

    def _cut(self, cache: Any, count: int, step: Step) -> None:
        if count:
            cache.left_padding = step.plus(cache.left_padding, -count)

    def view(
        self, fixed: Any, numbers: Sequence[mx.array], arrays: Sequence[mx.array], call: Call
    ) -> Any:
        view = _BatchRotating.__new__(_BatchRotating)
        view._begin(arrays, numbers[:2], call, fixed)
        view.offset, view.left_padding = numbers[2:]
        view._lengths = None
        return view

    def put(self, cache: Any, fixed: Any, arrays: Sequence[mx.array], step: Step) -> None:
        turned = cache.rotated or cache._idx == cache.max_size
        super().put(cache, fixed, arrays, step)
        cache.rotated = turned and step.count == 1

    def _count(self, cache: Any, step: Step) -> None:
        cache._offset += step.valid
        cache.offset = step.plus(cache.offset, step.valid)

    def content(self, cache: Any, until: mx.array | None = None) -> list[mx.array]:
        arrays = self._in_order(cache)
        first = max(0, cache._idx - cache.max_size)
        padding = cache.left_padding - first
        return [without_padding(a[..., first:, :], padding, until) for a in arrays]

    def until(self, cache: Any) -> mx.array | None:
        return None if cache._lengths is None else mx.minimum(cache.offset, cache._lengths)
