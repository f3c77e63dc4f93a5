"""What stands for mlx-lm's scans, against a loop over tokens in float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm")

from qgraph.lm.scans import CHUNK, delta_rule

KEY_HEADS, HEADS, DIM, VALUES = 2, 4, 8, 6
CASES = {
    "decays like a model's": lambda rng, shape: np.exp(-rng.exponential(0.5, shape)),
    "nothing is forgotten": lambda rng, shape: np.ones(shape),
    "all is forgotten": lambda rng, shape: np.where(rng.random(shape) < 0.3, 0.0, 0.9),
    "almost all is": lambda rng, shape: np.full(shape, 1e-30),
}


def given(count: int, decays: Any, same_keys: bool = False) -> list[Any]:
    """q, k, v, g, beta, state in float64; keys have length 1, as models make them."""
    rng = np.random.default_rng(count)
    q, k = (rng.normal(size=(2, count, KEY_HEADS, DIM)) for _ in "qk")
    if same_keys:
        k = np.repeat(k[:, :1], count, axis=1)
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    v, state = rng.normal(size=(2, count, HEADS, VALUES)), rng.normal(size=(2, HEADS, VALUES, DIM))
    beta = np.ones((2, count, HEADS)) if same_keys else rng.random((2, count, HEADS))
    return [q, k, v, decays(rng, (2, count, HEADS)), beta, state]


def by_token(q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, mask: Any) -> Any:
    q, k = (np.repeat(x, HEADS // KEY_HEADS, axis=2) for x in (q, k))
    ys, state = [], state.copy()
    for t in range(q.shape[1]):
        decayed = state * g[:, t, :, None, None]
        read = np.einsum("bhvd,bhd->bhv", decayed, k[:, t])
        d = (v[:, t] - read) * beta[:, t, :, None]
        after = decayed + d[..., None] * k[:, t, :, None]
        ys.append(np.einsum("bhvd,bhd->bhv", after, q[:, t]))
        state = np.where(mask[:, t, None, None, None], after, state)
    return np.stack(ys, axis=1), state


def none(*_: Any) -> Any:
    raise AssertionError("the model's own scan")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [1, 2, 4, 16, CHUNK, 3 * CHUNK])
def test_many_tokens(case: str, count: int) -> None:
    arrays = given(count, CASES[case])
    y, state = delta_rule(none, *(mx.array(x, mx.float32) for x in arrays))
    want = by_token(*arrays, np.ones((2, count), bool))
    for got, right in zip((y, state), want, strict=True):
        np.testing.assert_allclose(np.array(got), right, rtol=1e-4, atol=2e-5)


def test_the_same_token_again_and_again() -> None:
    """Powers of the system's matrix have binomial coefficients in them; blocks do not."""
    arrays = given(CHUNK, CASES["nothing is forgotten"], same_keys=True)
    y, state = delta_rule(none, *(mx.array(x, mx.float32) for x in arrays))
    want = by_token(*arrays, np.ones((2, CHUNK), bool))
    for got, right in zip((y, state), want, strict=True):
        np.testing.assert_allclose(np.array(got), right, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("count", [16, 2 * CHUNK])
def test_tokens_that_are_none(count: int) -> None:
    arrays = given(count, CASES["decays like a model's"])
    """Whatever they are followed by; what they give is what mlx-lm gives for them."""
    mask = np.random.default_rng(1).random((2, count)) < 0.7
    y, state = delta_rule(none, *(mx.array(x, mx.float32) for x in arrays), mx.array(mask))
    for got, right in zip((y, state), by_token(*arrays, mask), strict=True):
        np.testing.assert_allclose(np.array(got), right, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("count", [5, CHUNK + 1])
def test_what_is_left_to_the_model(count: int) -> None:
    """Counts that no chunks make up; a decay for each number of a key; one that may be no token."""
    arrays = [mx.array(x, mx.float32) for x in given(count, CASES["nothing is forgotten"])]
    assert delta_rule(lambda *given: len(given), *arrays) == 7
    one = [mx.array(x, mx.float32) for x in given(1, CASES["nothing is forgotten"])]
    assert delta_rule(lambda *given: len(given), *one, mx.array([[True], [False]])) == 7
    arrays[3] = mx.ones((2, 4, HEADS, DIM))
    assert delta_rule(lambda *given: len(given), *arrays) == 7
