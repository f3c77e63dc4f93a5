"""Caches of a window: what is older than the window makes room for what is new; `ring` has what the
model sees of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import dynamic_roll

from ..programs.call import Call, Step
from .filled import FilledKind
from .kind import Needs, Numbers, empty, rounded, same_length, without_padding
from .ring import BatchRotatingView, RotatingView


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

    def make_room(self, cache: Any, like: Any, needs: Needs) -> None:
        most, seen = cache.max_size, self.seen(cache)
        if cache.keys is None:
            length = min(most, rounded(seen + needs.count))
            self._set(cache, empty(like, needs.rows, length))
            cache._idx = 0
            return
        found = cache.keys.shape[2]
        length = needs.length(found, seen, most)
        if length == found:
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
        view = RotatingView.__new__(RotatingView)
        view.begin(arrays, numbers, call, fixed)
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
        view = BatchRotatingView.__new__(BatchRotatingView)
        view.begin(arrays, numbers[:2], call, fixed)
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
