"""`decode_attention` off CUDA, and what its kernel is handed; `tests/gpu` has the kernel itself."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qgraph.kernels.attention import decode_attention as module
from qgraph.kernels.attention.decode_attention import FAR, attention_on_host, decode_attention
from tests.support.compiler import forget_builds, needs_compiler

LENGTH = 6
Q = mx.random.normal((1, 4, 1, 64), key=mx.random.key(0))
K, V = (mx.random.normal((1, 2, LENGTH, 64), key=mx.random.key(i)) for i in (1, 2))


def on_host(*args: Any) -> mx.array:
    return attention_on_host(*args, 2)


@pytest.mark.parametrize(
    "attention", [decode_attention, pytest.param(on_host, marks=needs_compiler)]
)
@pytest.mark.parametrize("last", [-(2**31), -1, 0, 3, LENGTH - 1, LENGTH, 2**31 - 1])
def test_the_keys_that_are_seen(last: int, attention: Any) -> None:
    q, k, v = (np.asarray(a, np.float64) for a in (Q, K, V))
    seen = last + 1 if last >= 0 else LENGTH
    k, v = (np.repeat(a[:, :, :seen], 2, axis=1) for a in (k, v))
    scores = q @ k.swapaxes(-1, -2) * (0.125 if last >= 0 else 0.0)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    y = attention(Q, K, V, mx.array(last, mx.int32), 0.125)
    np.testing.assert_allclose(y, p / p.sum(-1, keepdims=True) @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("last", "handed"),
    [
        (mx.array(3), 3),
        (mx.array(-1), -1),
        (mx.array(2, mx.int8), 2),
        (mx.array(-2, mx.int64), -1),
        (mx.array(2**32 - 1, mx.uint32), FAR),
        (mx.array(2**40, mx.int64), FAR),
        (mx.array(-(2**40), mx.int64), -1),
        (mx.array(200, mx.uint8), 200),
    ],
    ids=str,
)
def test_positions_of_other_types_keep_their_meaning(
    last: mx.array, handed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[mx.array] = []

    def kernel(inputs: Any, **_: Any) -> Any:
        given.append(inputs[3])
        return [inputs[0]]

    monkeypatch.setattr(module, "on_cuda", lambda: True)
    monkeypatch.setattr(module, "_kernel", lambda *_: kernel)
    decode_attention(Q, K, V, last, 0.125)
    assert given[0].dtype == mx.int32
    assert given[0].item() == handed


def softmax_product(q: Any, k: Any, v: Any, scale: float) -> Any:
    """In float64, every head with keys of its own."""
    scores = q @ k.swapaxes(-1, -2) * scale
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


@needs_compiler
@pytest.mark.parametrize("dim", [16, 48, 80, 256])
@pytest.mark.parametrize("spread", [0.1, 1.0, 40.0])
def test_on_the_host_sizes_and_scores(dim: int, spread: float) -> None:
    """Scores from nearly equal to hundreds apart: the exponential from 1 to below its range."""
    q = spread * mx.random.normal((3, 6, 1, dim), key=mx.random.key(4))
    k, v = (mx.random.normal((3, 3, 301, dim), key=mx.random.key(i)) for i in (5, 6))
    y = attention_on_host(q, k, v, mx.array(299), 0.3, 2)
    wide = [np.repeat(np.asarray(a, np.float64)[:, :, :300], 2, axis=1) for a in (k, v)]
    want = softmax_product(np.asarray(q, np.float64), *wide, 0.3)
    # Scores of some hundreds are rounded by some 1e-5, which is the relative error of a weight.
    np.testing.assert_allclose(y, want, rtol=2e-4, atol=2e-4 if spread > 1 else 2e-5)


@needs_compiler
def test_infinities_and_nan_on_the_host() -> None:
    k = mx.array(K)
    k[0, 0, 1, 3] = float("nan")
    y = np.asarray(attention_on_host(Q, k, V, mx.array(LENGTH), 0.125, 1))
    assert np.isnan(y[0, :2]).all()
    assert np.isfinite(y[0, 2:]).all()
    unread = np.asarray(attention_on_host(Q, k, V, mx.array(0), 0.125, 1))
    assert np.isfinite(unread).all()


def test_without_a_compiler_mlx_stands_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    monkeypatch.setattr("qgraph.kernels.cpu.library.COMPILER", "false")
    forget_builds()
    with pytest.warns(UserWarning, match="could not be built"):
        y = attention_on_host(Q, K, V, mx.array(3), 0.125, 1)
    forget_builds()
    assert mx.array_equal(y, decode_attention(Q, K, V, mx.array(3), 0.125))
