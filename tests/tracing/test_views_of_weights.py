"""`x @ w.T`, with an array: the graph holds the weight under its name, and a view of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg

KEYS = mx.random.split(mx.random.key(0), 4)
PARAMS = {
    "proj": {"weight": mx.random.normal((128, 64), key=KEYS[0]) / 8},
    "stack": mx.random.normal((3, 64, 64), key=KEYS[1]) / 8,
}
X = mx.random.normal((2, 64), key=KEYS[2])


def by_t(x: Any) -> Any:
    return x @ PARAMS["proj"]["weight"].T


def by_transpose(x: Any) -> Any:
    return x @ PARAMS["proj"]["weight"].transpose(1, 0)


def by_axes(x: Any) -> Any:
    return x @ PARAMS["proj"]["weight"].transpose([1, 0])


def by_swapaxes(x: Any) -> Any:
    return x @ PARAMS["proj"]["weight"].swapaxes(0, 1)


def by_mt(x: Any) -> Any:
    return x @ PARAMS["proj"]["weight"].mT


def by_reshape(x: Any) -> Any:
    return x @ PARAMS["proj"]["weight"].reshape(2, 64, 64).flatten(0, 1).T


def by_slices(x: Any) -> Any:
    for i in range(3):
        x = x @ PARAMS["stack"][i].T
    return x


SPELLINGS: dict[str, Callable[[Any], Any]] = {
    fn.__name__: fn
    for fn in (by_t, by_transpose, by_axes, by_swapaxes, by_mt, by_reshape, by_slices)
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_weight_keeps_its_name_and_is_packed_along_its_rows(name: str) -> None:
    fn = SPELLINGS[name]
    rule = "stack" if fn is by_slices else "*proj.weight"
    config = qg.Quantize(bits=4, group_size=32, where=rule)
    program = qg.compile(fn, X, target="cpu", quantize=config)
    (weight,) = {w.name for w in program.plan.weights()}
    assert weight == ("stack" if fn is by_slices else "proj.weight")
    assert not [e for e in program.plan.ledger() if "matched no weight" in e.reason]

    # Against NumPy on the weight that went through MLX's own quantization, rows as they lie.
    def rounded(w: mx.array) -> Any:
        parts = mx.quantize(w, group_size=32, bits=4)
        return np.array(mx.dequantize(*parts, group_size=32, bits=4), np.float64)

    weights = list(PARAMS["stack"]) if fn is by_slices else [PARAMS["proj"]["weight"]]
    expected = np.array(X, np.float64)
    for w in weights:
        expected = expected @ rounded(w).T
    np.testing.assert_allclose(np.array(program(X)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SPELLINGS)
def test_without_quantizing_the_numbers_are_the_functions_own(name: str) -> None:
    fn = SPELLINGS[name]
    actual = qg.compile(fn, X, target="cpu", passes=[])(X)
    assert mx.allclose(actual, fn(X), rtol=1e-5, atol=1e-6)


def test_all_traces_of_a_program_share_the_weight() -> None:
    program = qg.jit(by_t, quantize=qg.Quantize(4), target="cpu")
    program(X)
    before = program.weight_bytes
    program(mx.concatenate([X, X]))
    assert program.weight_bytes == before


def test_a_view_keeps_the_elements_that_it_had() -> None:
    def fn(x: Any) -> Any:
        w = PARAMS["stack"][0] * 1
        view = w.T
        w += 1
        return x @ view + x @ w.T

    assert mx.allclose(qg.compile(fn, X, target="cpu")(X), fn(X), rtol=1e-4, atol=1e-4)


def test_a_view_that_changes_in_place_is_a_constant_of_its_own() -> None:
    def fn(x: Any) -> Any:
        view = (PARAMS["stack"][0] * 1).T
        view += 1
        return x @ view

    assert mx.allclose(qg.compile(fn, X, target="cpu")(X), fn(X), rtol=1e-4, atol=1e-4)


def test_outside_of_a_trace_arrays_are_mlxs_own() -> None:
    before = mx.array.T, mx.array.reshape, mx.array.__getitem__
    qg.trace(by_t, X)
    assert (mx.array.T, mx.array.reshape, mx.array.__getitem__) == before
