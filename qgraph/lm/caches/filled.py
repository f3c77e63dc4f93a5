"""Caches that fill up from the left: one token after the other, in the order of their positions."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import BatchKVCache, ChunkedKVCache, KVCache, QuantizedKVCache

from ..programs.call import Call, Step
from .kind import Kind, Needs, Numbers, empty, rounded, same_length, without_padding


class Filled:
    """A view's keys and values: buffers of fixed length, `at` the next position to write."""

    keys: Any
    values: Any

    def _begin(self, arrays: Sequence[Any], at: mx.array, call: Call) -> None:
        (self.keys, self.values), self.at, self.call = arrays, at, call
        self.offset: Any = at
        self._written = 0

    @property
    def length(self) -> int:
        return int(self.keys.shape[2])

    def _stored(self, buffers: Any, new: Any) -> Any:
        start = self.at.reshape(1)
        return tree_map(lambda a, b: mx.slice_update(a, b, start, axes=(2,)), buffers, new)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        count = keys.shape[2]
        self.keys = self._stored(self.keys, self._form(keys))
        self.values = self._stored(self.values, self._form(values))
        self.at = self.at + count
        self.offset = self.offset + count
        self._written += count
        return self.keys_and_values()

    def _form(self, new: mx.array) -> Any:
        return new

    def keys_and_values(self) -> tuple[Any, Any]:
        if not self.call.fresh:
            return self.keys, self.values
        whole = (self.keys, self.values)
        keys, values = tree_map(lambda a: a[..., : self._written, :], whole)
        return keys, values

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any
    ) -> Any:
        padding = getattr(self, "left_padding", None)
        if self.call.fresh:
            return self.call.first_mask(N, return_array, window_size, padding)
        return self.call.mask(self.at, N, self.length, window_size, padding)

    def maybe_trim_front(self) -> None:
        """Done before the program runs."""


class _KV(Filled, KVCache):
    pass


class _Batch(Filled, BatchKVCache):
    pass


class _Chunked(Filled, ChunkedKVCache):
    pass


class _Quantized(Filled, QuantizedKVCache):
    @property
    def length(self) -> int:
        return int(self.keys[0].shape[2])

    def _form(self, new: mx.array) -> Any:
        return tuple(mx.quantize(new, group_size=self.group_size, bits=self.bits))


class FilledKind(Kind):
    """`KVCache`, and a base of the others."""

    def fixed(self, cache: Any, count: int) -> Hashable:
        return ()

    def numbers(self, cache: Any) -> Numbers:
        return (self.used(cache),)

    def used(self, cache: Any) -> int:
        """Positions of the buffer that are written."""
        return int(cache.offset)

    def arrays(self, cache: Any) -> list[mx.array]:
        return [cache.keys, cache.values]

    def room(self, cache: Any) -> int | None:
        return int(self.arrays(cache)[0].shape[2]) - self.used(cache)

    def is_empty(self, cache: Any) -> bool:
        return self.used(cache) == 0

    def shapes(self, cache: Any) -> Any:
        return [((a.shape[1], a.shape[-1]), a.dtype) for a in self.arrays(cache)]

    def make_room(self, cache: Any, like: Any, needs: Needs) -> None:
        used = self.used(cache)
        if cache.keys is None:
            self._set(cache, empty(like, needs.rows, rounded(used + needs.count)))
            return
        arrays = self.arrays(cache)
        found = arrays[0].shape[2]
        length = needs.length(found, used)
        if length != found:
            self._set(cache, [same_length(a, length) for a in arrays])

    def _set(self, cache: Any, arrays: Sequence[mx.array]) -> None:
        cache.keys, cache.values = arrays

    def let_go(self, cache: Any) -> None:
        cache.keys = cache.values = None

    def content(self, cache: Any, until: mx.array | None = None) -> list[mx.array]:
        return [a[..., : self.used(cache), :] for a in self.arrays(cache)]

    def view(
        self, fixed: Any, numbers: Sequence[mx.array], arrays: Sequence[mx.array], call: Call
    ) -> Any:
        view = _KV.__new__(_KV)
        view._begin(arrays, numbers[0], call)
        return view

    def results(self, view: Any) -> list[mx.array]:
        return [view.keys, view.values]

    def put(self, cache: Any, fixed: Any, arrays: Sequence[mx.array], step: Step) -> None:
        self._set(cache, arrays)
        cache.offset += step.valid


class BatchKind(FilledKind):
    """`BatchKVCache`: rows padded on the left, each with an offset of its own."""

    def numbers(self, cache: Any) -> Numbers:
        return cache._idx, cache.offset, cache.left_padding

    def used(self, cache: Any) -> int:
        return int(cache._idx)

    def view(
        self, fixed: Any, numbers: Sequence[mx.array], arrays: Sequence[mx.array], call: Call
    ) -> Any:
        view = _Batch.__new__(_Batch)
        view._begin(arrays, numbers[0], call)
        view.offset, view.left_padding = numbers[1:]
        view._right_padding = None
        return view

    def put(self, cache: Any, fixed: Any, arrays: Sequence[mx.array], step: Step) -> None:
        self._set(cache, arrays)
        cache._idx += step.valid
        cache.offset = step.plus(cache.offset, step.valid)

    def content(self, cache: Any, until: mx.array | None = None) -> list[mx.array]:
        return [without_padding(a, cache.left_padding, until) for a in super().content(cache)]


class ChunkedKind(FilledKind):
    """`ChunkedKVCache`: what fell out of the chunk is cut off at the front, before a call."""

    def fixed(self, cache: Any, count: int) -> Hashable:
        return int(cache.chunk_size)

    def numbers(self, cache: Any) -> Numbers:
        return self.used(cache), cache.start_position

    def used(self, cache: Any) -> int:
        return int(cache.offset - cache.start_position)

    def can_go_back(self, cache: Any, count: int) -> bool:
        return bool(self.used(cache) + count <= cache.chunk_size)

    def make_room(self, cache: Any, like: Any, needs: Needs) -> None:
        cache.maybe_trim_front()
        super().make_room(cache, like, needs)

    def view(
        self, fixed: Any, numbers: Sequence[mx.array], arrays: Sequence[mx.array], call: Call
    ) -> Any:
        view: Any = _Chunked.__new__(_Chunked)
        view._begin(arrays, numbers[0], call)
        view.chunk_size, view.start_position = fixed, numbers[1]
        view.offset = numbers[0] + numbers[1]
        return view


class QuantizedKind(FilledKind):
    """`QuantizedKVCache`: keys and values as quantized arrays, their scales and biases."""

    def fixed(self, cache: Any, count: int) -> Hashable:
        return cache.group_size, cache.bits

    def arrays(self, cache: Any) -> list[mx.array]:
        return [*cache.keys, *cache.values]

    def _set(self, cache: Any, arrays: Sequence[mx.array]) -> None:
        cache.keys, cache.values = tuple(arrays[:3]), tuple(arrays[3:])

    def view(
        self, fixed: Any, numbers: Sequence[mx.array], arrays: Sequence[mx.array], call: Call
    ) -> Any:
        view = _Quantized.__new__(_Quantized)
        view._begin((tuple(arrays[:3]), tuple(arrays[3:])), numbers[0], call)
        view.group_size, view.bits = fixed
        return view

    def results(self, view: Any) -> list[mx.array]:
        return [*view.keys, *view.values]

    def content(self, cache: Any, until: mx.array | None = None) -> list[mx.array]:
        parts = super().content(cache)
        return [
            mx.dequantize(w, scales, biases, cache.group_size, cache.bits)
            for w, scales, biases in (parts[:3], parts[3:])
        ]
