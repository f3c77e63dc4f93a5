"""Ways of rounding a matrix, against NumPy in float64, and on arrays of MLX."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qgraph.fitting.rounding.formats import FORMATS, Format, packed
from qgraph.fitting.rounding.gptq import gptq
from qgraph.fitting.rounding.hessians import _product, factor, factor_by_halves, root
from qgraph.fitting.rounding.refine import refined
from qgraph.fitting.rounding.rounded import error, nearest
from tests.support.fitting import RNG, layer


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_packed_weights_are_the_numbers_of_the_grid(form: Format) -> None:
    w, h = layer()
    rounded = refined(w, h, gptq(w, factor(h), form, mx.float32), mx.float32)
    parts = packed(rounded.places, rounded.scales, rounded.biases, form, mx.float32)
    dense = mx.dequantize(*parts, **form.settings, dtype=mx.float32)
    np.testing.assert_allclose(np.array(dense), rounded.values(), rtol=1e-6, atol=1e-6)
    assert sum(p.nbytes for p in parts if p is not None) == form.bytes(w.shape, 4)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_plain_rounding_is_mlx_s(form: Format) -> None:
    w, _ = layer()
    rounded = nearest(w, form, mx.float32)
    dense = mx.dequantize(*mx.quantize(mx.array(w), **form.settings), **form.settings,
                          dtype=mx.float32)  # fmt: skip
    np.testing.assert_allclose(rounded.values(), np.array(dense), rtol=1e-5, atol=1e-5)


def in_float64(w: np.ndarray, h: np.ndarray, form: Format) -> np.ndarray:
    """GPTQ as in the paper's algorithm 1 with blocks of one column, on the plain grid of a group
    as it is when its first column is reached: after each, all later columns take the update."""
    w = w.astype(np.float64)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    for j in range(w.shape[1]):
        if j % form.group_size == 0:
            group = mx.array(w[:, j : j + form.group_size].astype(np.float32))
            _, scales, biases = (np.array(p) for p in mx.quantize(group, **form.settings))
        code = np.clip(np.rint((w[:, j : j + 1] - biases) / scales), 0, form.levels)
        value = code * scales + biases
        away = (w[:, j : j + 1] - value) / upper[j, j]
        w[:, j:] -= away * upper[j : j + 1, j:]
        w[:, j : j + 1] = value
    return w


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_the_paper_s(bits: int) -> None:
    w, h = layer(8)
    form = Format("affine", bits, 32)
    found = gptq(w, factor(h), form, mx.float32, search=False)
    wanted = in_float64(w, h, form)
    away = np.abs(found.values() - wanted)
    # A number that lies in the middle may fall to either side, and later ones then make up for it.
    assert np.mean(away < 1e-3 * np.abs(wanted).max()) > 0.97
    least = ((wanted - w) @ h * (wanted - w)).sum()
    assert error(w, h, found).sum() < 1.02 * least


def visited_in_float64(w: np.ndarray, h: np.ndarray, rounded: Any) -> np.ndarray:
    """One visit of all groups, by the book: scale and bias by least squares, all other groups as
    they are; then each code by trying all that there are."""
    form, size = rounded.form, rounded.form.group_size
    values = rounded.values().astype(np.float64)
    for row in range(len(w)):
        for start in range(0, w.shape[1], size):
            own = slice(start, start + size)
            design = np.zeros((w.shape[1], 2))
            design[own, 0], design[own, 1] = rounded.places[row, own], 1
            rest = w[row].astype(np.float64) - values[row]
            rest[own] = w[row, own]
            scale, bias = np.linalg.solve(design.T @ h @ design, design.T @ h @ rest)
            values[row, own] = rounded.places[row, own] * scale + bias
            grid = np.arange(form.levels + 1) * scale + bias
            for j in range(start, start + size):
                away = values[row] - w[row]
                # d H d for each number that d[j] may be, but for what they have in common
                pull = h[j] @ away - h[j, j] * away[j]
                tried = h[j, j] * (grid - w[row, j]) ** 2 + 2 * pull * (grid - w[row, j])
                values[row, j] = grid[tried.argmin()]
    return values


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_visit_sets_scales_and_codes_to_the_best(bits: int) -> None:
    from qgraph.fitting.rounding.refine import _visited

    w, h = layer(8, 64)
    rounded = nearest(w, Format("affine", bits, 32), mx.float32)
    found = _visited(w, h.astype(np.float32), rounded, mx.float32)
    wanted = visited_in_float64(w, h, rounded)
    away = np.abs(found.values() - wanted)
    # A number that lies in the middle may fall to either side, and later ones then differ too.
    assert np.mean(away < 1e-2 * np.abs(wanted).max()) > 0.95
    least = ((wanted - w) @ h * (wanted - w)).sum()
    assert error(w, h, found).sum() < 1.02 * least


@pytest.mark.parametrize("form", [f for f in FORMATS if f.group_size != 128], ids=str)
def test_each_step_lowers_the_error_of_the_product(form: Format) -> None:
    w, h = layer()
    importance = np.diag(h).astype(np.float32)

    def weighted(rounded: Any) -> float:
        return float((importance * (rounded.values() - w) ** 2).sum())

    plain = nearest(w, form, mx.float16)
    searched = nearest(w, form, mx.float16, importance)
    assert weighted(searched) <= weighted(plain)
    made_up = gptq(w, factor(h), form, mx.float16)
    best = refined(w, h, made_up, mx.float16)
    assert error(w, h, made_up).sum() < error(w, h, plain).sum()
    assert (error(w, h, best) <= error(w, h, made_up) * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    "form", [Format("affine", 3, 64), Format("mxfp4", 4, 32), Format("nvfp4", 4, 16)], ids=str
)
def test_on_arrays_of_mlx_it_is_the_same(form: Format) -> None:
    """As it runs on a GPU."""
    w, h = layer()
    both = []
    for array in (np.array, mx.array):
        here, upper, near = (array(a.astype(np.float32)) for a in (w, factor(h), h))
        found = refined(here, near, gptq(here, upper, form, mx.float16), mx.float16)
        both.append((np.array(found.places), float(error(here, near, found).sum())))
    (on_numpy, least), (on_mlx, away) = both
    assert np.mean(on_numpy != on_mlx) < 0.02  # what lies in the middle may differ
    assert away == pytest.approx(least, rel=0.02)


def test_the_root_and_the_factor_of_the_inverse() -> None:
    _, h = layer(1, 64)
    upper, r = factor(h), root(h)
    np.testing.assert_allclose(r @ r.T, h, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(upper.T @ upper @ h, np.eye(64), atol=1e-3)
    assert (np.tril(upper, -1) == 0).all()


@pytest.mark.parametrize("size", [64, 100, 129])
@pytest.mark.parametrize("condition", [1e1, 1e5])
def test_the_factor_by_halves_is_the_same(size: int, condition: float) -> None:
    """As a GPU has it."""
    basis, _ = np.linalg.qr(RNG.normal(size=(size, size)))
    h = (basis * np.geomspace(1, condition, size)) @ basis.T
    wanted = factor(h)
    found = np.array(factor_by_halves(mx.array(h.astype(np.float32)), host=16))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 + 1e-8 * condition)
    assert (np.tril(found, -1) == 0).all()


def test_products_in_two_parts_lose_nothing_on_tensor_cores(monkeypatch: Any) -> None:
    """Which keep ten bits of each number after its first."""
    a, b = (RNG.normal(size=(64, 64)).astype(np.float32) for _ in range(2))
    exact = a.astype(np.float64) @ b.astype(np.float64)

    def away(product: Any) -> float:
        return float(np.abs(np.array(product) - exact).max())

    def shortened(x: mx.array) -> mx.array:
        return ((x.view(mx.uint32) + 0x1000) & 0xFFFFE000).view(mx.float32)

    plain = mx.array.__matmul__
    monkeypatch.setattr(mx.array, "__matmul__", lambda x, y: plain(shortened(x), shortened(y)))
    assert away(mx.array(a) @ mx.array(b)) > 1e-3
    assert away(_product(mx.array(a), mx.array(b))) < 3e-5
