"""Equal ops of several results in one compiled stretch, on which `mx.compile` itself fails."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg

W = mx.random.normal((64, 64), key=mx.random.key(1)) / 8
X = mx.random.normal((2, 64), key=mx.random.key(0)) / 16


def in_turns(x: Any) -> Any:
    w = qg.tensor(W)
    return qg.fori_loop(0, 4, lambda i, h: h * 2 + qg.quantized_matmul(h, w * 2), x)


def turns_in_numpy(x: Any) -> Any:
    w = np.array(mx.dequantize(*mx.quantize(W * 2)), np.float64)
    for _ in range(4):
        x = x * 2 + x @ w.T
    return x


def apart(x: Any) -> Any:
    """Their numbers are constants of their own, which `mx.compile` merges first."""
    parts = [qg.split(x * qg.tensor(mx.array(2.0)), 2, axis=1) for _ in range(3)]
    return sum(a + b for a, b in parts)


def apart_in_numpy(x: Any) -> Any:
    return 6 * (x[:, :32] + x[:, 32:])


@pytest.mark.parametrize("passes", [[], None], ids=["as written", "optimized"])
@pytest.mark.parametrize(
    ("fn", "in_numpy"),
    [(in_turns, turns_in_numpy), (apart, apart_in_numpy)],
    ids=["turns", "apart"],
)
def test_they_run_once(fn: Any, in_numpy: Any, passes: Any) -> None:
    actual = qg.compile(qg.trace(fn, X), passes=passes, target="cpu")(X)
    expected = in_numpy(np.array(X, np.float64))
    np.testing.assert_allclose(np.array(actual), expected, rtol=1e-4, atol=1e-4)
