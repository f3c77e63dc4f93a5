"""Attention in the engine of regions, against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.compiler import needs_compiler
from tests.support.regions import EPSILON, FLOATS, Array, Steps, as_dtype, filled, h, wide

pytestmark = needs_compiler
RNG = np.random.default_rng(0)
F32 = FLOATS[0]


def attend(q: Array, k: Array, v: Array, threads: int = 2, **options: Any) -> Array:
    y = np.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    s = Steps()
    a = h.Attention(s.ref(q), s.ref(k), s.ref(v), s.ref(y))
    a.batch, a.heads, a.queries, a.dim = q.shape
    a.kv_heads, a.keys, a.value_dim = k.shape[1], k.shape[2], v.shape[3]
    for name, array in (("q", q), ("k", k), ("v", v), ("y", y)):
        setattr(a, f"{name}_strides", filled([t // array.itemsize for t in array.strides], 4))
    for name in ("last", "first", "mask", "sinks"):
        given = options.get(name)
        setattr(a, name, s.ref(given))
        if name in ("last", "first") and given is not None:
            setattr(a, f"{name}_batch", int(given.ndim > 0))
    a.scale, a.causal, a.window = 0.2, options.get("causal", 0), options.get("window", 0)
    if options.get("mask") is not None:
        mask = options["mask"]
        broadcast = np.broadcast_to(mask, (*q.shape[:3], k.shape[2]))
        a.mask_strides = filled([t // mask.itemsize for t in broadcast.strides], 4)
    s.add(h.ATTENTION, a)
    s.run(threads)
    return y


def reference(q: Array, k: Array, v: Array, **options: Any) -> Array:
    q, k, v = wide(q), wide(k), wide(v)
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) * 0.2
    queries, keys = scores.shape[2:]
    i, j = np.arange(queries)[:, None], np.arange(keys)
    end = np.full((q.shape[0], 1, queries, 1), keys)
    if options.get("causal"):
        end = end * 0 + i + 1 + keys - queries
    if (last := options.get("last")) is not None:
        end = end * 0 + np.reshape(last, (-1, 1, 1, 1)) + i - (queries - 1) + 1
    begin = end - options["window"] if options.get("window") else end * 0
    if (first := options.get("first")) is not None:
        begin = np.maximum(begin, np.reshape(first, (-1, 1, 1, 1)))
    hidden = np.broadcast_to((j < begin) | (j >= end), scores.shape)
    if (mask := options.get("mask")) is not None:
        if mask.dtype == np.bool_:
            hidden = hidden | ~mask
        else:
            scores = scores + wide(mask)
    scores = np.where(hidden, -3.4e38, scores)
    most = scores.max(-1, keepdims=True)
    sinks = options.get("sinks")
    if sinks is not None:
        most = np.maximum(most, wide(sinks)[:, None, None])
    p = np.exp(scores - most)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(wide(sinks)[:, None, None] - most)
    return p / total @ v


def check(dtype: Any, shape: tuple[int, ...], cache: Any = None, **options: Any) -> None:
    batch, heads, kv_heads, queries, keys, dim, value_dim = shape
    q = as_dtype(RNG.normal(size=(batch, queries, heads, dim)), dtype).transpose(0, 2, 1, 3)
    k = as_dtype(RNG.normal(size=(batch, kv_heads, keys, dim)), cache or dtype)
    v = as_dtype(RNG.normal(size=(batch, kv_heads, keys, value_dim)), cache or dtype)
    y, want = attend(q, k, v, **options), reference(q, k, v, **options)
    np.testing.assert_allclose(
        wide(y), want, rtol=0, atol=(60 if dtype == F32 else 2) * EPSILON[dtype]
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 9, 3, 1, 300, 64, 64),
        (2, 4, 4, 1, 50, 40, 24),
        (1, 8, 1, 1, 100, 80, 80),
        (2, 4, 2, 37, 37, 64, 64),
        (1, 2, 2, 3, 700, 16, 16),
        (1, 6, 2, 70, 600, 128, 96),
        (1, 2, 1, 5, 33, 300, 288),
        (1, 1, 1, 1, 1, 8, 8),
    ],
    ids=str,
)
def test_shapes(shape: tuple[int, ...], dtype: Any) -> None:
    check(dtype, shape)
    if shape[3] <= shape[4]:
        check(dtype, shape, causal=1)
        check(dtype, shape, causal=1, window=20)
    sinks = as_dtype(RNG.normal(size=shape[1]), dtype)
    check(dtype, shape, sinks=sinks)


@pytest.mark.parametrize("queries", [1, 4, 30])
@pytest.mark.parametrize("window", [0, 7, 300])
def test_positions(queries: int, window: int) -> None:
    shape = (2, 6, 2, queries, 520, 32, 32)
    for last in (queries - 1, 63, 64, 300, 519):
        check(F32, shape, last=np.array(last, np.int32), window=window)
    check(F32, shape, last=np.array([40, 333], np.int64), window=window)
    check(F32, shape, last=np.array([400, 333]), first=np.array([0, 30], np.uint32), window=window)


def test_a_position_past_the_end_sees_all_and_one_before_it_the_mean() -> None:
    q, k, v = (RNG.normal(size=(1, 2, n, 16)).astype(np.float32) for n in (1, 90, 90))
    everything = attend(q, k, v)
    np.testing.assert_array_equal(attend(q, k, v, last=np.array(2**40)), everything)
    mean = np.broadcast_to(v.mean(2, keepdims=True), q.shape)
    for last in (-1, -(2**31)):
        np.testing.assert_allclose(attend(q, k, v, last=np.array(last, np.int32)), mean, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("queries", [1, 30])
def test_masks(queries: int, dtype: Any) -> None:
    shape = (2, 4, 2, queries, 75, 32, 32)
    for axes in ((2, 4, queries, 75), (1, 1, queries, 75), (2, 1, 1, 75)):
        shown = RNG.random(axes) < 0.6
        shown[..., 0] = True
        check(dtype, shape, mask=shown)
        check(dtype, shape, mask=shown, last=np.array(50))
        check(dtype, shape, mask=as_dtype(RNG.normal(size=axes), dtype))
        check(dtype, shape, mask=as_dtype(np.where(shown, 0, -np.inf), np.dtype(np.float32)))
    check(dtype, shape, mask=np.zeros((1, 1, 1, 75), np.bool_))


@pytest.mark.parametrize("queries", [1, 30])
def test_caches_of_other_dtypes(queries: int) -> None:
    for cache in FLOATS[1:]:
        check(F32, (1, 4, 2, queries, 130, 64, 64), cache=cache)


@pytest.mark.parametrize("queries", [1, 20])
def test_what_is_not_a_number_counts_where_it_is_read(queries: int) -> None:
    q, k, v = (RNG.normal(size=(1, 2, n, 16)).astype(np.float32) for n in (queries, 90, 90))
    k[0, 0, 70] = np.nan
    y = attend(q, k, v)
    assert np.isnan(y[0, 0]).all()
    assert np.isfinite(y[0, 1]).all()
    v[0, 1, 80] = np.inf
    assert np.isfinite(attend(q, k, v, last=np.array(69))).all()
    assert np.isinf(attend(q, k, v)[0, 1]).all()


def test_scores_far_apart_and_threads() -> None:
    q, k, v = (RNG.normal(size=(1, 3, n, 64)).astype(np.float32) for n in (2, 2000, 2000))
    want = reference(40 * q, k, v)
    one = attend(40 * q, k, v, threads=1)
    np.testing.assert_allclose(one, want, atol=3e-4)
    np.testing.assert_array_equal(one, attend(40 * q, k, v, threads=2))
