"""Weights fitted on a GPU are as good as those fitted on the host: skipped without one."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.fitting.numbers import on_grid
from qgraph.fitting.rounding.formats import Format, there
from qgraph.fitting.rounding.hessians import Curvature, damped, factor
from qgraph.fitting.rounding.rounded import error
from tests.support.fitting import Model, data

pytestmark = pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a GPU of NVIDIA's")

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    before = mx.default_device()
    yield
    mx.set_default_device(before)


def hessian(columns: int) -> np.ndarray:
    mixing = RNG.normal(size=(64, columns)) * RNG.uniform(0.1, 1, columns)
    x = RNG.normal(size=(2048, 64)) @ mixing + RNG.normal(size=(2048, columns)) / 4
    return x.T @ x / len(x)


def test_the_factor_of_a_hessian_is_float64_s() -> None:
    h = hessian(1500)
    mx.set_default_device(mx.gpu)
    found, wanted = np.array(Curvature(h).factor), factor(damped(h))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("methods", [("scales",), ("gptq", "scales")])
def test_a_matrix_comes_as_near_as_on_the_host(methods: tuple[str, ...]) -> None:
    h, w = hessian(1088), RNG.normal(size=(96, 1088)).astype(np.float32)
    near, form = h.astype(np.float32), Format("affine", 4, 64)

    def away(device: mx.Device) -> float:
        mx.set_default_device(device)
        rounded, _ = on_grid(there(w), Curvature(h), form, mx.float16, methods)
        parts = (np.array(part) for part in (rounded.places, rounded.scales, rounded.biases))
        mx.set_default_device(mx.cpu)
        return float(error(w, near, type(rounded)(form, *parts)).sum())

    assert away(mx.gpu) == pytest.approx(away(mx.cpu), rel=0.02)


def test_a_model_is_fitted() -> None:
    mx.random.seed(3)
    model, ids = Model(), data()
    away = []
    for device in (mx.cpu, mx.gpu):
        mx.set_default_device(device)
        config = qg.Quantize.fit(model, ids, bits=5.5, result="logits", formats=[{"bits": 4}])
        program = qg.compile(model, ids[0], quantize=config)
        away.append(float(sum(mx.square(program(x) - model(x)).mean() for x in ids)))
    on_host, on_gpu = away
    assert on_gpu == pytest.approx(on_host, rel=0.1)
