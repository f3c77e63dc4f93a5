"""Second moments, and a Hessian that serves other text as well as its own."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qgraph.fitting.rounding.formats import Format
from qgraph.fitting.rounding.gptq import gptq
from qgraph.fitting.rounding.hessians import damped, factor
from qgraph.fitting.rounding.refine import refined
from qgraph.fitting.rounding.rounded import error
from qgraph.fitting.statistics.moments import Moments
from tests.support.fitting import shrunk


def test_moments_are_gathered_batch_by_batch() -> None:
    random = np.random.default_rng(0)
    batches = [random.standard_normal((rows, 8)).astype(np.float32) for rows in (5, 1, 30)]
    weights = [random.uniform(0, 2, len(x)).astype(np.float32) for x in batches]
    full, columns = Moments(8, full=True), Moments(8, full=False)
    for x, weight in zip(batches, weights, strict=True):
        full.add(x, weight)
        columns.add(mx.array(x), weight)
    x, weight = np.concatenate(batches).astype(np.float64), np.concatenate(weights)
    wanted = (x.T * weight) @ x / len(x)
    np.testing.assert_allclose(full.mean(), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(full.hessian(), shrunk(wanted, 36), rtol=1e-5, atol=1e-6)
    for found in (columns.mean(), columns.hessian()):
        np.testing.assert_allclose(found, np.diag(wanted), rtol=1e-5)


@pytest.mark.parametrize("rows", [64, 256])
def test_few_rows_do_not_make_other_rows_worse(rows: int) -> None:
    """What is fitted to chance in them is lost elsewhere."""
    random = np.random.default_rng(1)
    mixing = random.standard_normal((128, 128)) * random.uniform(0.1, 1, 128)

    def text(count: int) -> np.ndarray:
        """Rows that are like the one before, as words are."""
        fresh = random.standard_normal((count, 128))
        for i in range(1, count):
            fresh[i] = 0.8 * fresh[i - 1] + 0.6 * fresh[i]
        return fresh @ mixing

    fitting, other = text(rows), text(8192)
    w = random.standard_normal((16, 128)).astype(np.float32)
    moments = Moments(128, full=True)
    moments.add(fitting.astype(np.float32))
    truth = (other.T @ other / len(other)).astype(np.float32)

    def away(hessian: np.ndarray) -> float:
        h = damped(hessian)
        form = Format("affine", 3, 64)
        rounded = gptq(w, factor(h), form, mx.float16)
        return float(error(w, truth, refined(w, h.astype(np.float32), rounded, mx.float16)).sum())

    assert away(moments.hessian()) < 0.95 * away(moments.mean())
