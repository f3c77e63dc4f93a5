"""Norms, rope, softmax, reductions, cumulative operations and moves in the engine of regions."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.support.compiler import needs_compiler
from tests.support.regions import EPSILON, FLOATS, Array, Steps, as_dtype, filled, h, strides, wide

pytestmark = needs_compiler
RNG = np.random.default_rng(0)
floats = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def near(got: Array, want: Array, ulps: float = 1.01, atol: float = 0.0) -> None:
    epsilon = EPSILON[got.dtype]
    np.testing.assert_allclose(wide(got), want, rtol=ulps * epsilon, atol=atol * epsilon)


@floats
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("columns", [5, 64, 577])
def test_norms(layer: int, columns: int, dtype: Any) -> None:
    x = as_dtype(RNG.normal(size=(7, columns + 3)), dtype)[:, :columns]
    weight, bias = (as_dtype(RNG.normal(size=columns), dtype) for _ in range(2))
    for w, b in ((weight, bias), (weight, None), (None, None)):
        y = np.zeros((7, columns), dtype)
        a = h.Norm(x=(s := Steps()).ref(x), y=s.ref(y), weight=s.ref(w), bias=s.ref(b))
        a.layer, a.rows, a.columns, a.eps = layer, 7, columns, 1e-5
        a.x_row, a.x_column, a.y_row, a.y_column = *strides(x), *strides(y)
        s.add(h.NORM, a)
        s.run()
        want = wide(x) - (wide(x).mean(-1, keepdims=True) if layer else 0)
        want = want / np.sqrt((want**2).mean(-1, keepdims=True) + 1e-5)
        if w is not None:
            want = want * wide(w)
        if b is not None:
            want = want + wide(b)
        near(y, want, 4, atol=4)


@floats
@pytest.mark.parametrize("traditional", [0, 1])
@pytest.mark.parametrize("dims", [16, 10])
def test_rope(traditional: int, dims: int, dtype: Any) -> None:
    x = as_dtype(RNG.normal(size=(2, 5, 3, 16)), dtype).transpose(0, 2, 1, 3)  # 3 heads, 5 long
    freqs = np.geomspace(1, 5000, dims // 2).astype(np.float32)
    offset = np.array([3, 40], np.int32)
    for given in (None, freqs):
        y = np.zeros((2, 3, 5, 16), dtype)
        s = Steps()
        a = h.Rope(x=s.ref(x), y=s.ref(y), freqs=s.ref(given), offset=s.ref(offset))
        a.batch, a.heads, a.length, a.dim, a.dims, a.traditional = 2, 3, 5, 16, dims, traditional
        a.x_strides, a.y_strides = filled(strides(x), 4), filled(strides(y), 4)
        a.offset_batch, a.start, a.base, a.scale = 1, 2, 10000.0, 0.5
        s.add(h.ROPE, a)
        s.run()
        step = (
            1 / freqs.astype(np.float64)
            if given is not None
            else 10000.0 ** (-2 * np.arange(dims // 2) / dims)
        )
        at = (offset[:, None] + 2 + np.arange(5)) * 0.5
        angle = (at[..., None] * step)[:, None]
        half = dims // 2
        left, right = (
            (np.s_[..., :dims:2], np.s_[..., 1:dims:2])
            if traditional
            else (np.s_[..., :half], np.s_[..., half:dims])
        )
        want = wide(x).copy()
        want[left] = wide(x)[left] * np.cos(angle) - wide(x)[right] * np.sin(angle)
        want[right] = wide(x)[left] * np.sin(angle) + wide(x)[right] * np.cos(angle)
        near(y, want, 2, atol=20 if dtype == np.float32 else 2)


def rows_of(s: Steps, x: Array, y: Array, axis: int, length: int | None = None) -> Any:
    """`qg_rows` along an axis."""
    axis %= x.ndim
    others = [i for i in range(x.ndim) if i != axis]
    r = h.Rows(x=s.ref(x), y=s.ref(y), rank=len(others))
    r.shape = filled([x.shape[i] for i in others])
    sx, sy = [t // x.itemsize for t in x.strides], [t // y.itemsize for t in y.strides]
    r.x_strides, r.y_strides = filled([sx[i] for i in others]), filled([sy[i] for i in others])
    r.length, r.x_axis, r.y_axis = x.shape[axis] if length is None else length, sx[axis], sy[axis]
    return r


@floats
@pytest.mark.parametrize(("shape", "axis"), [((3, 4, 17), -1), ((40, 6), 0), ((1, 3000), 1)])
def test_softmax(shape: tuple[int, ...], axis: int, dtype: Any) -> None:
    x = as_dtype(RNG.normal(0, 4, size=shape), dtype)
    y = np.zeros(shape, dtype)
    s = Steps()
    s.add(h.SOFTMAX, h.Softmax(rows_of(s, x, y, axis)))
    s.run()
    e = np.exp(wide(x) - wide(x).max(axis, keepdims=True))
    near(y, e / e.sum(axis, keepdims=True), 12 if dtype == np.float32 else 1.01, atol=1e-3)


REDUCTIONS: dict[str, Any] = {
    "SUM": np.sum, "MEAN": np.mean, "PROD": np.prod, "MAX": np.max, "MIN": np.min,
    "LOGSUMEXP": lambda x, axis: np.log(np.exp(x).sum(axis)), "VAR": np.var,
}  # fmt: skip


def reduce(op: str, x: Array, axes: tuple[int, ...], out: Any) -> Array:
    axes = tuple(a % x.ndim for a in axes)
    outer = [i for i in range(x.ndim) if i not in axes]
    y = np.zeros([x.shape[i] for i in outer], out)
    s = Steps()
    a = h.Reduce(
        x=s.ref(x), y=s.ref(y), op=getattr(h, op), outer_rank=len(outer), inner_rank=len(axes)
    )
    own = [t // x.itemsize for t in x.strides]
    a.outer, a.x_outer = filled([x.shape[i] for i in outer]), filled([own[i] for i in outer])
    a.inner, a.x_inner = filled([x.shape[i] for i in axes]), filled([own[i] for i in axes])
    a.y_outer = filled([t // y.itemsize for t in y.strides])
    s.add(h.REDUCE, a)
    s.run()
    return y


@floats
@pytest.mark.parametrize("axes", [(1,), (0, 2), (2,), (0, 1, 2)])
def test_reductions_of_floats(axes: tuple[int, ...], dtype: Any) -> None:
    x = as_dtype(1 + RNG.normal(size=(4, 5, 33)) / 9, dtype)
    for op, function in REDUCTIONS.items():
        near(
            reduce(op, x, axes, dtype),
            function(wide(x), axis=axes),
            40 if dtype == np.float32 else 1.01,
            1e-3,
        )
    flat = np.moveaxis(wide(x), axes, range(-len(axes), 0)).reshape(
        *(n for i, n in enumerate(x.shape) if i not in axes), -1
    )
    np.testing.assert_array_equal(reduce("ARGMAX", x, axes, np.uint32), flat.argmax(-1))
    np.testing.assert_array_equal(reduce("ARGMIN", x, axes, np.uint32), flat.argmin(-1))
    np.testing.assert_array_equal(reduce("ANY", x, axes, np.bool_), True)


def test_reductions_of_integers_and_what_is_not_a_number() -> None:
    for dtype in (np.int8, np.uint8, np.int32, np.uint64, np.int64):
        x = RNG.integers(0, 100, (6, 50)).astype(dtype)
        out = np.int32 if np.dtype(dtype).kind == "i" and np.dtype(dtype).itemsize < 8 else dtype
        np.testing.assert_array_equal(reduce("SUM", x, (1,), out), x.sum(1, dtype=out))
        np.testing.assert_array_equal(reduce("MAX", x, (0,), dtype), x.max(0))
        np.testing.assert_array_equal(reduce("ARGMIN", x, (1,), np.uint32), x.argmin(1))
        np.testing.assert_array_equal(reduce("ALL", x, (1,), np.bool_), x.all(1))
    x = np.array([[1, np.nan, 2, np.inf], [-np.inf] * 4, [np.inf, 1, 2, 3]], np.float32)
    np.testing.assert_array_equal(reduce("MAX", x, (1,), np.float32), [np.nan, -np.inf, np.inf])
    np.testing.assert_array_equal(reduce("MIN", x, (1,), np.float32), [np.nan, -np.inf, 1])
    np.testing.assert_array_equal(reduce("ARGMAX", x, (1,), np.uint32), [1, 0, 0])
    np.testing.assert_array_equal(
        reduce("LOGSUMEXP", x, (1,), np.float32), [np.nan, -np.inf, np.inf]
    )
    big = np.full((1, 1_000_000), 0.1, np.float32)
    np.testing.assert_allclose(
        reduce("SUM", big, (1,), np.float32), big.astype(np.float64).sum(), rtol=2e-6
    )


CUMULATIVE: dict[str, Any] = {
    "SUM": np.cumsum, "PROD": np.cumprod, "MAX": np.maximum.accumulate,
    "MIN": np.minimum.accumulate,
    "LOGSUMEXP": lambda x, axis: np.log(np.cumsum(np.exp(x), axis)),
}  # fmt: skip


def scan(op: str, x: Array, axis: int, reverse: bool = False, exclusive: bool = False) -> Array:
    y = np.zeros(x.shape, x.dtype)
    s = Steps()
    s.add(h.SCAN, h.Scan(rows_of(s, x, y, axis), getattr(h, op), reverse, exclusive))
    s.run()
    return y


@floats
@pytest.mark.parametrize("axis", [0, 1])
def test_cumulative(axis: int, dtype: Any) -> None:
    x = as_dtype(1 + RNG.normal(size=(30, 40)) / 9, dtype)
    for op, function in CUMULATIVE.items():
        near(scan(op, x, axis), function(wide(x), axis=axis), 1.01, 1e-3)
        back = np.flip(function(np.flip(wide(x), axis), axis=axis), axis)
        near(scan(op, x, axis, reverse=True), back, 1.01, 1e-3)
    before = np.roll(np.cumsum(wide(x), axis), 1, axis)
    before[(0,) if axis == 0 else (slice(None), 0)] = 0
    near(scan("SUM", x, axis, exclusive=True), before, 1.01, 1e-3)
    whole = RNG.integers(-9, 9, (5, 20)).astype(np.int32)
    for op in ("SUM", "MAX", "MIN"):
        np.testing.assert_array_equal(scan(op, whole, axis), CUMULATIVE[op](whole, axis))


def copied(x: Array, y: Array, starts: Any = None, into: Any = None) -> None:
    s = Steps()
    a = h.Copy()
    for name, array in (("x", x), ("y", y)):
        shape = filled(array.shape)
        own = filled([t // array.itemsize for t in array.strides])
        setattr(a, name, h.View(s.ref(array), array.ndim, shape, own))
    for name, given in (("x_starts", starts), ("y_starts", into)):
        slots = [h.Start(s.ref(i), stride, limit) for i, stride, limit in given or []]
        setattr(a, name, (h.Start * 8)(*slots, *[h.Start(s.ref(None))] * (8 - len(slots))))
    s.add(h.COPY, a)
    s.run()


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.int64])
def test_views_become_arrays(dtype: Any) -> None:
    x = RNG.integers(0, 100, (4, 6, 10)).astype(dtype)
    for view in (
        x.transpose(2, 0, 1),
        x[::-1, ::2],
        x[:, 1:2, 3:],
        np.broadcast_to(x[0, 0], (3, 10)),
        x.T,
    ):
        y = np.zeros(view.shape, dtype)
        copied(view, y)
        np.testing.assert_array_equal(y, view)
    y = np.zeros((4, 6, 20), dtype)
    copied(x, y[:, :, 10:])
    np.testing.assert_array_equal(y, np.concatenate([np.zeros_like(x), x], 2))
    one, two = np.array(3, dtype), np.zeros((), dtype)
    copied(one, two)
    assert two == 3


@pytest.mark.parametrize("position", [0, 3, 6, 100, -5])
def test_slices_at_positions(position: int) -> None:
    cache, at = np.zeros((2, 8, 5), np.float32), np.array(position, np.int64)
    new = RNG.normal(size=(2, 2, 5)).astype(np.float32)
    copied(new, cache[:, :2], into=[(at, 5, 6)])
    kept = min(max(position, 0), 6)
    want = np.zeros_like(cache)
    want[:, kept : kept + 2] = new
    np.testing.assert_array_equal(cache, want)
    out = np.zeros((2, 2, 5), np.float32)
    copied(cache[:, :2], out, starts=[(at, 5, 6)])
    np.testing.assert_array_equal(out, new)


def test_rows_by_index() -> None:
    x = RNG.normal(size=(2, 9, 5)).astype(np.float32)
    indices = np.array([0, 8, -1, 3, -9, 50, -50], np.int32)
    y = np.zeros((2, 7, 5), np.float32)
    s = Steps()
    none = s.ref(None)
    s.add(h.TAKE, h.Take(s.ref(x), s.ref(y), none, none, s.ref(indices), 2, 9, 5, 7, h.DENSE))
    s.run()
    np.testing.assert_array_equal(
        y, x[:, np.clip(np.where(indices < 0, indices + 9, indices), 0, 8)]
    )


def test_along_an_axis_and_sorted() -> None:
    x = RNG.normal(size=(3, 40, 2)).astype(np.float32)
    order = np.zeros(x.shape, np.uint32)
    s = Steps()
    s.add(h.SORT, h.Sort(rows_of(s, x, order, 1), 1, 0))
    y = np.zeros(x.shape, np.float32)
    a = h.TakeAlong(rows_of(s, x, y, 1), s.ref(order))
    a.index_strides, a.index_axis, a.x_length = a.rows.y_strides, a.rows.y_axis, 40
    s.add(h.TAKE_ALONG, a)
    s.run()
    np.testing.assert_array_equal(y, np.sort(x, 1))
    np.testing.assert_array_equal(order, np.argsort(x, 1))
    for dtype in (*FLOATS, np.int8, np.uint64):
        x = as_dtype(np.array([3, 1, 2, 1, 0, 7, 5] * 3), dtype)
        y = np.zeros(5, dtype)
        s = Steps()
        s.add(h.SORT, h.Sort(rows_of(s, x, y, 0), 0, 5))
        s.run()
        np.testing.assert_array_equal(wide(y), np.sort(wide(x))[:5])
    x = np.array([2, np.nan, -np.inf, 1, 2, -0.0, 0.0], np.float32)
    order = np.zeros(7, np.uint32)
    s = Steps()
    s.add(h.SORT, h.Sort(rows_of(s, x, order, 0), 1, 0))
    s.run()
    assert order.tolist() == [2, 5, 6, 3, 0, 4, 1]


@pytest.mark.parametrize("pairs", [1, 5, 16, 20_001])
def test_random_words_are_those_of_mlx(pairs: int) -> None:
    keys = np.stack([np.array(mx.random.key(seed)) for seed in (0, 7)])
    y = np.zeros((2, 2 * pairs), np.uint32)
    s = Steps()
    s.add(h.RANDOM, h.Random(s.ref(keys), s.ref(y), 2, 2 * pairs))
    s.run()
    for row, key in zip(y, keys, strict=True):
        want = mx.random.split(mx.array(key), pairs)
        np.testing.assert_array_equal(row, np.array(want).ravel())


def test_an_odd_number_of_random_words() -> None:
    key = mx.random.key(3)
    y = np.zeros(7, np.uint32)
    s = Steps()
    s.add(h.RANDOM, h.Random(s.ref(np.array(key)), s.ref(y), 1, 7))
    s.run()
    uniform = np.array(mx.random.uniform(shape=(7,), key=key))
    np.testing.assert_allclose(y / 2**32, uniform, atol=1e-6)
