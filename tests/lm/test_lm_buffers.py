"""Buffers of caches: how long they are, and what they hold when their length changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import cache as lm

from qgraph.lm.caches.kind import Needs, same_length
from qgraph.lm.caches.table import kind_of

HEADS, DIM, LONG = 2, 64, 16384


def quantized() -> Any:
    return lm.QuantizedKVCache(group_size=32, bits=8)


def batch() -> Any:
    return lm.BatchKVCache([3, 0])


def chunked() -> Any:
    return lm.ChunkedKVCache(2 * LONG)


def ring() -> Any:
    return lm.RotatingKVCache(max_size=LONG, keep=4)


def ring_of_rows() -> Any:
    return lm.BatchRotatingKVCache(LONG, [3, 0])


MADE = [lm.KVCache, quantized, batch, chunked, ring, ring_of_rows]


def some(count: int, seed: int) -> tuple[mx.array, mx.array]:
    keys = mx.random.split(mx.random.key(seed))
    shape = 2, HEADS, count, DIM
    return mx.random.normal(shape, key=keys[0]), mx.random.normal(shape, key=keys[1])


def filled(make: Callable[[], Any]) -> Any:
    """A cache with 150 tokens in a buffer that held many more."""
    cache = make()
    cache.update_and_fetch(*some(150, 0))
    kind = kind_of(cache)
    assert kind is not None
    kind._set(cache, [same_length(a, LONG) for a in kind.arrays(cache)])  # type: ignore[attr-defined]
    return cache


def length(cache: Any) -> int:
    kind = kind_of(cache)
    assert kind is not None
    return int(kind.arrays(cache)[0].shape[2])


def seen(cache: Any) -> list[Any]:
    """What attention is given for two tokens more, one after the other, by mlx-lm itself."""
    results = []
    for seed in (1, 2):
        given = cache.update_and_fetch(*some(1, seed))
        mask = cache.make_mask(1, return_array=True) if hasattr(cache, "left_padding") else None
        arrays = [a for a in (*given, mask) if a is not None]
        results += [p for a in arrays for p in (a if isinstance(a, tuple) else (a,))]
    return [np.array(a) for a in results]


@pytest.mark.parametrize("make", MADE)
def test_a_buffer_that_is_nearly_empty_is_cut_where_it_is_copied(make: Callable[[], Any]) -> None:
    cache, same = filled(make), filled(make)
    kind = kind_of(cache)
    assert kind is not None
    before = [np.array(a) for a in kind.content(cache)]
    kind.make_room(cache, None, Needs(2, 1, copied=True))
    assert length(cache) == 256
    after = kind.content(cache)
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, np.array(b))
    assert vars(cache).keys() == vars(same).keys()
    for a, b in zip(seen(cache), seen(same), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", MADE)
def test_it_stays_where_programs_write_into_it(make: Callable[[], Any]) -> None:
    cache = filled(make)
    kind = kind_of(cache)
    assert kind is not None
    kind.make_room(cache, None, Needs(2, 1))
    assert length(cache) == LONG


def test_a_buffer_that_is_nearly_full_is_not_cut() -> None:
    cache = lm.KVCache()
    cache.update_and_fetch(*some(600, 0))
    kind = kind_of(cache)
    assert kind is not None
    kind.make_room(cache, None, Needs(2, 1, copied=True))
    assert length(cache) == 1024
    cache.trim(500)
    kind.make_room(cache, None, Needs(2, 1, copied=True))
    assert length(cache) == 256
    cache.update_and_fetch(*some(101, 1))
    kind.make_room(cache, None, Needs(2, 60, copied=True))
    assert (cache.offset, length(cache)) == (201, 512)


def test_a_ring_that_has_come_round_is_full() -> None:
    cache = lm.RotatingKVCache(max_size=1024, keep=4)
    cache.update_and_fetch(*some(1020, 0))
    for seed in range(1, 9):
        cache.update_and_fetch(*some(1, seed))
    kind = kind_of(cache)
    assert kind is not None
    kind.make_room(cache, None, Needs(2, 1, copied=True))
    before = [np.array(a) for a in kind.content(cache)]
    assert (cache.offset, length(cache)) == (1028, 1024)
    kind.make_room(cache, None, Needs(2, 1, copied=True))
    for a, b in zip(before, kind.content(cache), strict=True):
        np.testing.assert_array_equal(a, np.array(b))
