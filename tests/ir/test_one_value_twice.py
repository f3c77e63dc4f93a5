"""One value in several places of a node: what is changed in one place stays in the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg

W = mx.random.normal((64, 64), key=mx.random.key(0)) / 8
ROW = mx.random.normal((1, 64), key=mx.random.key(1))


def wide(x: Any) -> Any:
    return qg.broadcast_to(x, (64, 64))


PROGRAMS: dict[str, Callable[[Any, Any], Any]] = {
    "addmm adds what it multiplies": lambda r, w: qg.addmm(b := wide(r), b, w),
    "on the right": lambda r, w: qg.addmm(b := wide(r), w, b),
    "all three": lambda r, w: qg.addmm(b := wide(r), b, b),
    "a broadcast times itself": lambda r, w: (b := wide(r)) * b,
    "chosen by itself": lambda r, w: qg.where((b := wide(r)) > 0, b, b),
    "beside a whole one": lambda r, w: (b := wide(r)) * b + w,
}


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("name", PROGRAMS)
def test_broadcasts(name: str, constant: bool) -> None:
    fn = PROGRAMS[name]
    if constant:
        actual = qg.compile(lambda w: fn(ROW, w), W, target="cpu")(W)
    else:
        actual = qg.compile(fn, ROW, W, target="cpu")(ROW, W)
    assert mx.allclose(actual, fn(ROW, W), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fn",
    [lambda x: x @ W @ W, lambda x: x + (W @ W)[:1], lambda x: x + qg.addmm(W, W, W)[:1]],
    ids=["twice", "itself", "added too"],
)
def test_weights_that_multiply_themselves(fn: Any) -> None:
    """Quantized in both places or in none: the result is that of one rounding of the weight."""
    plan = qg.optimize(qg.trace(fn, ROW), target="cpu", quantize=qg.Quantize(8))
    plan.check(ROW)
    result = np.array(qg.compile(fn, ROW, target="cpu", quantize=qg.Quantize(8))(ROW))
    np.testing.assert_allclose(result, np.array(fn(ROW)), rtol=0.2, atol=0.1)
