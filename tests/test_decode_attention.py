"""`decode_attention` off CUDA, and what its kernel is handed; `tests/gpu` has the kernel itself."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qgraph.kernels import decode_attention as module
from qgraph.kernels.decode_attention import decode_attention

LENGTH = 6
Q = mx.random.normal((1, 4, 1, 64), key=mx.random.key(0))
K, V = (mx.random.normal((1, 2, LENGTH, 64), key=mx.random.key(i)) for i in (1, 2))


@pytest.mark.parametrize("last", [-(2**31), -1, 0, 3, LENGTH - 1, LENGTH, 2**31 - 1])
def test_the_keys_that_are_seen(last: int) -> None:
    q, k, v = (np.asarray(a, np.float64) for a in (Q, K, V))
    seen = last + 1 if last >= 0 else LENGTH
    k, v = (np.repeat(a[:, :, :seen], 2, axis=1) for a in (k, v))
    scores = q @ k.swapaxes(-1, -2) * (0.125 if last >= 0 else 0.0)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    y = decode_attention(Q, K, V, mx.array(last, mx.int32), 0.125)
    np.testing.assert_allclose(y, p / p.sum(-1, keepdims=True) @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("last", "handed"),
    [
        (mx.array(3), 3),
        (mx.array(-1), -1),
        (mx.array(2, mx.int8), 2),
        (mx.array(-2, mx.int64), -2),
        (mx.array(2**32 - 1, mx.uint32), LENGTH - 1),
        (mx.array(2**40, mx.int64), LENGTH - 1),
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

    monkeypatch.setattr(module, "_on_cuda", lambda: True)
    monkeypatch.setattr(module, "_kernel", lambda: kernel)
    decode_attention(Q, K, V, last, 0.125)
    assert given[0].dtype == mx.int32
    assert given[0].item() == handed
