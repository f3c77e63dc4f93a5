"""Attention of few tokens on a GPU against float64: skipped without one."""

import mlx.core as mx
import numpy as np
import pytest

from qgraph.kernels.attention.cached_attention import Heads, Rope, cached_attention
from qgraph.kernels.attention.decode_attention import decode_attention
from qgraph.kernels.attention.tail_attention import merge_tail, tail_attention

pytestmark = pytest.mark.skipif(not mx.is_available(mx.gpu), reason="needs a GPU")

TOLERANCE = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 5e-3}
SIZES = [
    (mx.bfloat16, 128, 32, 8, 512, 300),
    (mx.float16, 64, 9, 3, 200, 0),
    (mx.float32, 64, 4, 4, 333, 332),
    (mx.bfloat16, 128, 4, 1, 3000, 2900),
    (mx.float16, 128, 4, 2, 70, 1000),
    (mx.bfloat16, 64, 4, 2, 700, -1),
    (mx.float32, 128, 8, 2, 2065, 255),
    (mx.float16, 64, 8, 2, 1025, 256),
]
TURNS = [
    (Rope(), False),
    (Rope(64, False, 1e4, 1.0), False),
    (Rope(64, True, 5e5, 0.5), False),
    (Rope(32, False, 1e4, 1.0), False),
    (Rope(64, False, None, 1.0), True),
]


def as_float64(x):
    return np.array(x.astype(mx.float32), np.float64)


def attention(q, k, v, last, scale):
    """q (batch, heads, dim), k and v (batch, kv_heads, length, dim)."""
    seen, scale = (last + 1, scale) if last >= 0 else (k.shape[2], 0.0)
    k, v = (np.repeat(a[:, :, :seen], q.shape[1] // k.shape[1], axis=1) for a in (k, v))
    scores = np.einsum("bhd,bhld->bhl", q, k) * scale
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhl,bhld->bhd", p / p.sum(-1, keepdims=True), v)


def rotate(x, rope, position, freqs):
    """x (..., dim), by the formula of RoFormer (arXiv 2104.09864)."""
    half = rope.dims // 2
    if not half:
        return x
    each = 1 / freqs if freqs is not None else rope.base ** -(np.arange(half) / half)
    angle, y = rope.scale * position * each, x.copy()
    first = np.arange(half) * 2 if rope.traditional else np.arange(half)
    second = first + (1 if rope.traditional else half)
    a, b = x[..., first], x[..., second]
    y[..., first] = a * np.cos(angle) - b * np.sin(angle)
    y[..., second] = a * np.sin(angle) + b * np.cos(angle)
    return y


@pytest.fixture(autouse=True)
def on_gpu():
    with mx.stream(mx.gpu):
        yield


def near(got, want, dtype, turned=False):
    """Angles of 1300 are rounded by 6e-5 in float32."""
    tolerance = max(TOLERANCE[dtype], 2e-4 if turned else 0)
    return np.linalg.norm(as_float64(got) - want) < tolerance * np.linalg.norm(want)


@pytest.mark.parametrize(("dtype", "dim", "heads", "kv_heads", "length", "last"), SIZES)
def test_decode_attention(dtype, dim, heads, kv_heads, length, last):
    rng = np.random.default_rng(0)
    q, k, v = (
        mx.array(rng.normal(size=(2, h, n, dim))).astype(dtype)
        for h, n in ((heads, 1), (kv_heads, length), (kv_heads, length))
    )
    y = decode_attention(q, k, v, mx.array(last), dim**-0.5)
    q, k, v = map(as_float64, (q, k, v))
    assert near(y[:, :, 0], attention(q[:, :, 0], k, v, last, dim**-0.5), dtype)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("length", [100, 1300])
@pytest.mark.parametrize("turn", range(len(TURNS)))
def test_cached_attention(dtype, length, turn):
    """Heads in one array and in three; positions within, at the ends of and outside the cache."""
    rope, with_freqs = TURNS[turn]
    rng = np.random.default_rng(turn)
    batch, heads, kv_heads, dim = 2, 6, 2, 64
    freqs = rng.uniform(1, 100, rope.dims // 2) if with_freqs else None
    width = (heads + 2 * kv_heads) * dim
    x = mx.array(rng.normal(size=(batch, width))).astype(dtype)
    keys, values = (
        mx.array(rng.normal(size=(batch, kv_heads, length, dim))).astype(dtype) for _ in "kv"
    )
    ends = np.cumsum([heads, kv_heads]) * dim
    apart = mx.split(x, ends.tolist(), axis=-1)
    counts = (heads, kv_heads, kv_heads)
    together = tuple(Heads(n, s, width) for n, s in zip(counts, (0, *ends.tolist()), strict=True))
    alone = tuple(Heads(n, 0, n * dim) for n in counts)
    given = None if freqs is None else mx.array(freqs, mx.float32)
    offset = None if turn % 2 else mx.array(1000)  # else it is turned by its position
    for position, last in ((0, 0), (57, 57), (length - 1, length - 1), (57, 80), (57, 20), (57, -1),
                           (length, 30)):  # fmt: skip
        for arrays, where in (([x] * 3, together), (apart, alone)):
            got = cached_attention(
                *arrays, keys, values, mx.array(position), mx.array(last), given, offset,
                heads=where, rope=rope, scale=0.125,
            )  # fmt: skip
            q, k, v = (as_float64(a).reshape(batch, -1, dim) for a in apart)
            by = position if offset is None else 1000
            q, k = (rotate(a, rope, by, freqs) for a in (q, k))
            want = [as_float64(keys), as_float64(values)]
            if position < length:
                want[0][:, :, position], want[1][:, :, position] = k, v
            assert near(got[0][:, :, 0], attention(q, *want, last, 0.125), dtype, rope.dims)
            assert near(got[1], want[0], dtype, rope.dims)
            assert np.array_equal(as_float64(got[2]), want[1])


def test_arrays_at_any_address():
    """Caches and heads that begin in the midst of others, where 16 bytes are no single read."""
    rng = np.random.default_rng(0)
    length, dim = 700, 64
    cache = mx.array(rng.normal(size=1 + 2 * length * dim)).astype(mx.float16)
    x = mx.array(rng.normal(size=3 + 4 * dim)).astype(mx.float16)
    mx.eval(cache, x)
    heads = (Heads(2, 0, 4 * dim), Heads(2, 0, 2 * dim), Heads(2, 0, 2 * dim))
    place = mx.array(300)

    def results(keys, q, k):
        return cached_attention(
            q, k, k, keys, keys, place, place, heads=heads, rope=Rope(), scale=0.1
        )

    shifted = cache[1:].reshape(1, 2, length, dim), x[3 : 3 + 2 * dim], x[3 + 2 * dim :]
    mx.eval(shifted)
    copies = [mx.array(np.array(a)) for a in shifted]
    heads = (Heads(2, 0, 2 * dim),) * 3
    for got, want in zip(results(*shifted), results(*copies), strict=True):
        assert mx.array_equal(got, want).item()
    q = shifted[1].reshape(1, 2, 1, dim)
    got = decode_attention(q, shifted[0], shifted[0], place, 0.1)
    want = decode_attention(q, copies[0], copies[0], place, 0.1)
    assert mx.array_equal(got, want).item()


# dtype, dims of keys and values, batch, heads, kv_heads, queries, length; then what is asked for.
FEATURES = [
    ((mx.bfloat16, 128, 128, 1, 32, 8, 1, 16384), {"last": [16000]}),
    ((mx.bfloat16, 128, 128, 4, 32, 8, 1, 3000), {"last": [100, 2999, 1500, 7]}),
    ((mx.bfloat16, 128, 128, 16, 8, 2, 1, 700), {"last": [650] * 16, "first": list(range(16))}),
    ((mx.float16, 64, 64, 1, 64, 8, 1, 600), {"last": [500], "window": 128, "sinks": True}),
    ((mx.bfloat16, 256, 256, 1, 8, 4, 1, 900), {"last": [800], "window": 512}),
    ((mx.bfloat16, 128, 128, 1, 32, 8, 8, 2000), {"last": [1900]}),
    ((mx.float16, 128, 128, 2, 16, 8, 3, 500), {"last": [400, 90], "first": [3, 80]}),
    ((mx.bfloat16, 192, 128, 1, 16, 16, 1, 700), {"last": [650], "mask": mx.bfloat16}),
    ((mx.float16, 64, 64, 2, 8, 2, 4, 300), {"mask": mx.bool_, "sinks": True}),
    ((mx.float32, 64, 64, 2, 8, 2, 2, 700), {"mask": mx.float32, "last": [600, 5]}),
]


def wanted(q, k, v, seen, scale, added=0.0, sinks=None):
    """All (batch, heads, …), float64; `seen` broadcasts to the scores."""
    k, v = (np.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
    scores = np.where(seen, np.einsum("bhqd,bhkd->bhqk", q, k) * scale + added, -np.inf)
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.reshape(1, -1, 1, 1)
        top = np.maximum(top, sinks)
    p = np.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks - top)
    return np.einsum("bhqk,bhkd->bhqd", p / total, v)


@pytest.mark.parametrize(("sizes", "asked"), FEATURES, ids=lambda x: "-".join(map(str, x)))
def test_features(sizes, asked):
    dtype, dim, value_dim, batch, heads, kv_heads, queries, length = sizes
    rng = np.random.default_rng(length)

    def made(*shape, dtype=dtype):
        return mx.array(rng.normal(size=shape)).astype(dtype)

    q, k = made(batch, heads, queries, dim), made(batch, kv_heads, length, dim)
    v = made(batch, kv_heads, length, value_dim)
    at = np.arange(length)
    last = np.array(asked.get("last", [length - 1] * batch))
    end = last[:, None, None, None] - np.arange(queries - 1, -1, -1)[:, None] + 1
    seen, more, added = at < end, {}, 0.0
    if "window" in asked:
        seen = seen & (at >= end - asked["window"])
        more["window"] = asked["window"]
    if "first" in asked:
        more["first"] = mx.array(asked["first"])
        seen = seen & (at >= np.array(asked["first"])[:, None, None, None])
    if asked.get("mask") is mx.bool_:
        mask = mx.array(rng.random((batch, 1, queries, length)) < 0.7)
        seen, more["mask"] = seen & np.array(mask), mask
    elif "mask" in asked:
        more["mask"] = made(1, heads, 1, length, dtype=asked["mask"])
        added = as_float64(more["mask"])
    if "sinks" in asked:
        more["sinks"] = made(heads)
    y = decode_attention(q, k, v, mx.array(last), 0.1, **more)
    sinks = as_float64(more["sinks"]) if "sinks" in more else None
    want = wanted(*map(as_float64, (q, k, v)), seen, 0.1, added, sinks)
    assert near(y, want, dtype)

    mask = mx.array(seen)
    if "mask" in more and more["mask"].dtype != mx.bool_:
        mask = mx.where(mask, more["mask"], -mx.inf).astype(dtype)
    by_mlx = mx.fast.scaled_dot_product_attention(
        q, k, v, scale=0.1, mask=mask, sinks=more.get("sinks")
    )
    ours, theirs = (np.linalg.norm(as_float64(a) - want) for a in (y, by_mlx))
    assert ours <= max(1.05 * theirs, 2e-6 * np.linalg.norm(want))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("length", [100, 1300])
def test_a_tail(dtype, length):
    """Tokens into a tail and into the cache: the same results, and the same cache at the end."""
    rng = np.random.default_rng(length)
    batch, heads, kv_heads, dim, rows = 2, 6, 2, 64, 8
    shape = (batch, kv_heads, length, dim)
    keys, values = (mx.array(rng.normal(size=shape)).astype(dtype) for _ in "kv")
    now = keys, values
    tail = (*(mx.zeros((batch, kv_heads, rows, dim), dtype) for _ in "kv"), mx.full(rows, -1))
    tail = (*tail[:2], tail[2].astype(mx.int32))
    width = (heads + 2 * kv_heads) * dim
    where = (Heads(6, 0, width), Heads(2, 384, width), Heads(2, 512, width))
    for position in (57, 58, 59, 58, length, 60, 99, 3):
        x = mx.array(rng.normal(size=(batch, width))).astype(dtype)
        last = mx.array(min(position, length - 1))
        more = {"heads": where, "rope": Rope(64, False, 1e4, 1.0), "scale": 0.125}
        y, *now = cached_attention(x, x, x, *now, mx.array(position), last, **more)
        z, *tail = tail_attention(x, x, x, keys, values, *tail, mx.array(position), last, **more)
        assert near(z, as_float64(y), dtype)
    for cache, some, whole in zip((keys, values), tail, now, strict=False):
        assert mx.array_equal(merge_tail(cache, some, tail[2]), whole)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("length", [128, 1300])
@pytest.mark.parametrize("window", [0, 37])
def test_sinks_and_a_window_beside_a_token_that_is_stored(dtype, length, window):
    """As gpt_oss has them, into a copy of the cache and into a tail."""
    rng = np.random.default_rng(length)
    heads, kv_heads, dim = 16, 4, 64
    shape = (1, kv_heads, length, dim)
    keys, values = (mx.array(rng.normal(size=shape)).astype(dtype) for _ in "kv")
    sinks = mx.array(rng.normal(size=heads)).astype(dtype)
    tail = [mx.zeros((1, kv_heads, 8, dim), dtype) for _ in "kv"]
    tail.append(mx.full(8, -1).astype(mx.int32))
    now = keys, values
    width = (heads + 2 * kv_heads) * dim
    where = (Heads(16, 0, width), Heads(4, 1024, width), Heads(4, 1280, width))
    more = {"heads": where, "rope": Rope(), "scale": 0.125, "sinks": sinks, "window": window}
    for position in (57, 58, length - 1):
        x = mx.array(rng.normal(size=(1, width))).astype(dtype)
        place = mx.array(position)
        y, *now = cached_attention(x, x, x, *now, place, place, **more)
        z, *tail = tail_attention(x, x, x, keys, values, *tail, place, place, **more)
        at = np.arange(length)
        seen = (at <= position) & (at > position - (window or length))
        q = as_float64(x)[:, : heads * dim].reshape(1, heads, 1, dim)
        want = wanted(q, *map(as_float64, now), seen, 0.125, sinks=as_float64(sinks))
        assert near(y, want, dtype)
        assert near(z, want, dtype)
