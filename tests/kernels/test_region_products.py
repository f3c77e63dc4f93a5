"""Products in the engine of regions, against NumPy in float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qgraph.kernels.cpu.region import RegionError
from tests.support import reference
from tests.support.compiler import needs_compiler
from tests.support.regions import BF16, EPSILON, FLOATS, Array, Steps, as_dtype, filled, h, wide

pytestmark = needs_compiler
RNG = np.random.default_rng(0)
F32 = FLOATS[0]
MODES = {"affine": h.AFFINE, "mxfp4": h.MXFP4, "mxfp8": h.MXFP8, "nvfp4": h.NVFP4}
FORMATS = [("affine", b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
FORMATS += [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]
ROWS = (1, 2, 3, 4, 5, 17, 31)


def elements(array: Array) -> list[int]:
    return [t // array.itemsize for t in array.strides]


class Packed:
    """A packed weight of random numbers, (…, rows, columns), and what it stands for."""

    def __init__(
        self, shape: tuple[int, ...], mode: str, bits: int, group: int, scales: Any = F32
    ) -> None:
        dtype = {F32: mx.float32, FLOATS[1]: mx.float16, BF16: mx.bfloat16}[scales]
        w = mx.random.normal(shape, dtype, key=mx.random.key(len(shape) + bits))
        parts = mx.quantize(w, group_size=group, bits=bits, mode=mode)
        self.codes, *self.scales = [
            np.array(p.view(mx.uint16)).view(BF16) if p.dtype == mx.bfloat16 else np.array(p)
            for p in parts
        ]
        self.mode, self.bits, self.group = mode, bits, group
        flat = [np.array(self.codes).reshape(-1, self.codes.shape[-1])]
        flat += [
            (wide(s) if s.dtype != np.uint8 else s).reshape(-1, s.shape[-1]) for s in self.scales
        ]
        dense = reference.dequantize(*flat, bits=bits, group_size=group, mode=mode)
        self.dense = np.asarray(dense, np.float64).reshape(shape)

    def weight(self, s: Steps) -> Any:
        biases = self.scales[1] if len(self.scales) > 1 else None
        return h.Weight(s.ref(self.codes), s.ref(self.scales[0]), s.ref(biases))


def product(s: Steps, x: Array, w: Any, y: Array, **options: Any) -> Any:
    """A step: x (m, k) by w (n, k), dense or `Packed`, into y (m, n)."""
    none = h.Weight(s.ref(None), s.ref(None), s.ref(None))
    a = h.Matmul(x=s.ref(x), y=s.ref(y), alpha=1.0, w2=none)
    a.m, a.k, a.n = *x.shape[-2:], y.shape[-1]
    (a.x_row, a.x_column), (a.y_row, a.y_column) = elements(x)[-2:], elements(y)[-2:]
    if isinstance(w, Packed):
        a.w, a.mode, a.bits, a.group = w.weight(s), MODES[w.mode], w.bits, w.group
    else:
        a.w = h.Weight(s.ref(w), s.ref(None), s.ref(None))
        a.w_row, a.w_column = elements(w)[-2:]
    for name in ("bias", "times", "add", "lhs", "rhs"):
        setattr(a, name, s.ref(options.pop(name, None)))
    for name, value in options.items():
        setattr(a, name, value)
    s.add(h.MATMUL, a)
    return a


def check(got: Array, want: Array, scale: float = 1.0) -> None:
    limit = scale * (5e-6 if got.dtype == F32 else EPSILON[got.dtype])
    assert np.abs(wide(got) - want).max() <= limit * max(np.abs(want).max(), 1e-3)


def run(x: Array, w: Any, n: int, dtype: Any, threads: int = 2, **options: Any) -> Array:
    y = np.zeros((*x.shape[:-1], n), dtype)
    product(s := Steps(), x, w, y, **options)
    s.run(threads)
    return y


@pytest.mark.parametrize(("mode", "bits", "group"), FORMATS, ids=str)
def test_packed_formats_and_odd_shapes(mode: str, bits: int, group: int) -> None:
    for n, k in ((1, 128), (5, 384), (67, 640), (33, 2176)):
        w = Packed((n, k), mode, bits, group)
        for m in ROWS:
            x = RNG.normal(size=(m, k)).astype(np.float32)
            check(run(x, w, n, F32), x @ w.dense.T)


@pytest.mark.parametrize("scales", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [2, 20])
def test_packed_in_half_precision(m: int, dtype: Any, scales: Any) -> None:
    w = Packed((48, 2304), "affine", 4, 64, scales)
    x = as_dtype(RNG.normal(size=(2304, m)), dtype).T  # not contiguous
    check(run(x, w, 48, dtype), wide(x) @ w.dense.T)


@pytest.mark.parametrize(("mode", "bits", "group"), FORMATS[::4], ids=str)
def test_packed_along_columns(mode: str, bits: int, group: int) -> None:
    w = Packed((70, 384), mode, bits, group)
    for m in (1, 9):
        x = RNG.normal(size=(m, 70)).astype(np.float32)
        check(run(x, w, 384, F32, columns_first=1), x @ w.dense)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", ROWS)
def test_dense_weights_as_they_lie(m: int, dtype: Any) -> None:
    for n, k in ((1, 1), (5, 3), (70, 130), (33, 2100)):
        x = RNG.normal(size=(m, k)).astype(np.float32)
        across = as_dtype(RNG.normal(size=(n, k)), dtype)
        for w in (
            across,
            as_dtype(RNG.normal(size=(k, n)), dtype).T,
            as_dtype(RNG.normal(size=(n, k, 2)), dtype)[..., 1],
        ):
            check(run(x, w, n, F32), x @ wide(w).T)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 3, 40])
@pytest.mark.parametrize("packed", [True, False])
def test_what_follows_the_sums(packed: bool, m: int, dtype: Any) -> None:
    n, k = 75, 256
    x = as_dtype(RNG.normal(size=(m, k)) / 8, dtype)
    weights: list[Any] = [Packed((n, k), "affine", 4, 32, dtype) for _ in range(2)]
    if not packed:
        weights = [as_dtype(w.dense, dtype) for w in weights]
    one, two = (w.dense if packed else wide(w) for w in weights)
    bias = as_dtype(RNG.normal(size=n), dtype)
    times, add = (as_dtype(RNG.normal(size=(m, n)), dtype) for _ in range(2))
    y = np.zeros((m, n), dtype)
    product(
        s := Steps(),
        x,
        weights[0],
        y,
        bias=bias,
        times=times,
        add=add,
        times_row=n,
        add_row=n,
        alpha=0.5,
    )
    s.run()
    check(y, (0.5 * wide(x) @ one.T + wide(bias)) * wide(times) + wide(add), 3)
    y = np.zeros((m, n), dtype)
    s = Steps()
    second = (
        h.Weight(s.ref(weights[1]), s.ref(None), s.ref(None))
        if not packed
        else weights[1].weight(s)
    )
    product(s, x, weights[0], y, w2=second, activation=h.SILU)
    s.run()
    check(y, silu(wide(x) @ one.T) * (wide(x) @ two.T), 3)
    residual = add.copy()  # added in place
    product(s := Steps(), x, weights[0], residual, add=residual, add_row=n)
    s.run()
    check(residual, wide(x) @ one.T + wide(add), 2)


@pytest.mark.parametrize("m", [2, 20])
def test_batches(m: int) -> None:
    x = RNG.normal(size=(3, m, 2, 40)).astype(np.float32).transpose(0, 2, 1, 3)
    w = RNG.normal(size=(2, 50, 40)).astype(np.float32)
    y = np.zeros((3, 2, m, 50), np.float32)
    product(s := Steps(), x, w, y, batch_rank=2, batch=filled([3, 2], 4),
            x_batch=filled(elements(x)[:2], 4),
            w_batch=filled([0, 2000], 4), y_batch=filled(elements(y)[:2], 4))  # fmt: skip
    s.run()
    check(y, x.astype(np.float64) @ w.transpose(0, 2, 1))
    packed = Packed((2, 32, 64), "affine", 4, 32)
    x, y = RNG.normal(size=(3, 2, m, 64)).astype(np.float32), np.zeros((3, 2, m, 32), np.float32)
    product(s := Steps(), x, packed, y, batch_rank=2, batch=filled([3, 2], 4),
            x_batch=filled(elements(x)[:2], 4),
            w_batch=filled([0, 1], 4), y_batch=filled(elements(y)[:2], 4))  # fmt: skip
    s.run()
    check(y, x @ packed.dense.transpose(0, 2, 1))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("entries", [3, 400])
@pytest.mark.parametrize("gated", [True, False])
def test_rows_that_pick_matrices(entries: int, packed: bool, gated: bool) -> None:
    n, k, experts, tokens = 200, 1056, 4, 9
    weights: list[Any] = [Packed((experts, n, k), "affine", 4, 32) for _ in range(2)]
    if not packed:
        weights = [w.dense.astype(np.float32) for w in weights]
    one, two = (w.dense if packed else wide(w) for w in weights)
    x = (RNG.normal(size=(tokens, 1, k)) / 30).astype(np.float32)
    rhs = RNG.integers(0, experts - 1, entries).astype(np.uint32)  # one is never taken
    lhs = RNG.integers(0, tokens, entries).astype(np.int32)
    y = np.zeros((entries, 1, n), np.float32)
    s = Steps()
    none = s.ref(None)
    second = h.Weight(none, none, none)
    if gated:
        second = weights[1].weight(s) if packed else h.Weight(s.ref(weights[1]), none, none)
    product(s, x, weights[0], y, lhs=lhs, rhs=rhs, batch_rank=1, batch=filled([entries], 4),
            x_batch=filled([0], 4), w_batch=filled([0], 4), y_batch=filled([n], 4), x_stack=k,
            x_matrices=tokens, w_stack=1 if packed else n * k, w_matrices=experts, w2=second,
            activation=h.SILU if gated else h.IDENTITY)  # fmt: skip
    s.run()
    want = x[lhs] @ one[rhs].transpose(0, 2, 1)
    if gated:
        want = silu(want) * (x[lhs] @ two[rhs].transpose(0, 2, 1))
    check(y, want)


@pytest.mark.parametrize("rounded", [0, 1])
@pytest.mark.parametrize("threads", [1, 2])
def test_products_of_the_same_rows_put_them_in_order_once(threads: int, rounded: int) -> None:
    m, k = 90, 2048  # more than is read where it lies
    x = RNG.normal(size=(m, k)).astype(np.float32)
    first, second = (Packed((n, k), "affine", 4, 32) for n in (40, 33))

    def region(*cases: tuple[Array, Packed]) -> tuple[int, list[float]]:
        """Its memory, and the error of each product in one phase."""
        s, made = (
            Steps(),
            [np.zeros((len(rows), w.dense.shape[0]), np.float32) for rows, w in cases],
        )
        for (rows, w), y in zip(cases, made, strict=True):
            product(s, rows, w, y, rounded=rounded)
            if y is not made[0]:
                s.steps[-1].flags = 0
        s.run(threads)
        errors = [abs(y - (want := rows @ w.dense.T)).max() / abs(want).max()
                  for (rows, w), y in zip(cases, made, strict=True)]  # fmt: skip
        return s.made().memory(threads), errors

    ordered = (m - 1) * k * (1 if rounded else 4)
    same, errors = region((x, first), (x, second))
    for rows in (x.copy(), x[1:]):
        apart, more = region((x, first), (rows, second))
        assert same + ordered <= apart
        errors += more
    assert max(errors) < (1e-2 if rounded else 5e-6)


@pytest.mark.parametrize("m", [5, 15, 16, 29, 64])
def test_rows_are_shared_out_evenly_and_read_where_they_lie(m: int) -> None:
    w = Packed((40, 640), "affine", 4, 32)
    rows = RNG.normal(size=(2 * m, 1280)).astype(np.float32)
    for x in (rows[::2, :640], rows[::-2, 640:], rows[:m, ::2]):  # the last are not side by side
        check(run(x, w, 40, F32), x @ w.dense.T)


def test_infinities_and_nan_stay_in_their_rows() -> None:
    w = Packed((40, 64), "affine", 4, 64)
    x = np.ones((20, 64), np.float32)
    x[3, 5] = np.nan
    y = run(x, w, 40, F32)
    assert np.isnan(y[3]).all()
    assert np.isfinite(np.delete(y, 3, 0)).all()


def test_mistakes_have_words() -> None:
    x, w, y = (np.zeros((4, 4), np.float32) for _ in range(3))
    for change, words in (
        ({"m": 5}, "x reaches bytes 0 to 80 of buffer 0, which has 64"),
        ({"y_row": -1}, "y reaches bytes -12"),
        ({"mode": h.AFFINE, "bits": 7, "group": 32}, "no packed weight has mode 1, 7 bits"),
        ({"activation": 77}, "activation 77 is none"),
    ):
        s = Steps()
        product(s, x, w, y, **change)
        with pytest.raises(RegionError, match=words):
            s.run()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_that_are_rounded_first(bits: int, group: int, dtype: Any) -> None:
    for m, n, k in ((1, 5, 128), (9, 33, 256), (70, 100, 384), (200, 64, 128)):
        w, w2 = (Packed((n, k), "affine", bits, group) for _ in range(2))
        x = as_dtype(RNG.standard_normal((m, k)) + RNG.standard_normal((m, 1)), dtype)
        x[0, :40] = 0
        parts = [np.array(p) for p in mx.quantize(mx.array(wide(x).astype(F32)), 32, 8)]
        stands_for = reference.dequantize(*parts, bits=8, group_size=32)
        s, y, gated = Steps(), np.zeros((m, n), F32), np.zeros((m, n), F32)
        product(s, x, w, y, rounded=1)
        a = product(s, x, w, gated, rounded=1, activation=h.SILU)
        a.w2 = w2.weight(s)
        s.steps.pop()
        s.add(h.MATMUL, a)
        s.run(2)
        want = np.asarray(stands_for, np.float64) @ w.dense.T
        check(y, want, 4)
        check(gated, want / (1 + np.exp(-want)) * want, 8)


def test_what_is_not_finite_stays_so_when_rounded() -> None:
    x, w = np.ones((3, 64), F32), Packed((8, 64), "affine", 4, 32)
    x[0, 3], x[1, 50] = np.nan, np.inf
    y = run(x, w, 8, F32, rounded=1)
    assert np.isnan(y[:2]).all()
    assert np.isfinite(y[2]).all()


def test_rounded_rows_want_their_kind_of_weight() -> None:
    x, w = np.ones((4, 64), F32), Packed((8, 64), "affine", 5, 32)
    with pytest.raises(RegionError, match="one affine weight of 4 or 8 bits"):
        run(x, w, 8, F32, rounded=1)
