"""Parameters of a program that compiles per input types: prepared before it knows them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.errors import InputError

W = mx.random.normal((128, 64), key=mx.random.key(0)) / 8
X = mx.random.normal((2, 64), key=mx.random.key(1))


def model(params: Any, x: Any) -> Any:
    return qg.quantized_matmul(x, params["w"]) * params["scale"]


def params(w: mx.array = W) -> dict[str, mx.array]:
    return {"w": w, "scale": mx.array(2.0)}


def test_before_the_first_call_and_for_all_types() -> None:
    program = qg.jit(model, parameters=[0], target="cpu")
    prepared = program.prepare(params())
    for rows in (1, 2, 7, 2):
        x = mx.random.normal((rows, 64), key=mx.random.key(rows))
        assert mx.allclose(program(prepared, x), model(params(), x), rtol=1e-4, atol=1e-5)
    assert len(program.executables) == 3


def test_each_of_several() -> None:
    """After calls with two shapes of the weight, what is prepared of either fits."""
    program = qg.jit(model, parameters=[0], target="cpu")
    for w in (W, W[:64]):
        program(params(w), X)
    for w in (W, W[:64]):
        prepared = program.prepare(params(w))
        assert mx.allclose(program(prepared, X), model(params(w), X), rtol=1e-4, atol=1e-5)


def test_it_is_packed_once_for_types() -> None:
    program = qg.jit(model, parameters=[0], target="cpu")
    prepared = program.prepare(params())
    program(prepared, X)
    (executable,) = program.executables
    calls = []
    inner = executable.prepare
    executable.prepare = lambda arrays: calls.append(1) or inner(arrays)  # type: ignore[method-assign]
    program(prepared, X)
    assert not calls


def test_parameters_in_several_places_and_by_name() -> None:
    def fn(w: Any, x: Any, bias: Any, *, factor: Any) -> Any:
        return (qg.quantized_matmul(x, w) + bias) * factor

    program = qg.jit(fn, parameters=[0, 2], target="cpu")
    bias, factor = mx.ones(128), mx.array(0.5)
    prepared = program.prepare(W, bias)
    expected = fn(W, X, bias, factor=factor)
    assert mx.allclose(program(prepared, X, factor=factor), expected, rtol=1e-4, atol=1e-5)


def test_a_prepare_of_something_else_is_refused() -> None:
    program, other = (qg.jit(model, parameters=[0], target="cpu") for _ in range(2))
    with pytest.raises(InputError, match="another program"):
        other(program.prepare(params()), X)
    with pytest.raises(InputError, match="positional arguments"):
        program.prepare()
    with pytest.raises(InputError, match="positional arguments"):
        program.prepare(params(), X)
    with pytest.raises(InputError, match="no parameters"):
        qg.jit(model, target="cpu").prepare(params())
    with pytest.raises(InputError, match="takes arrays"):
        program.prepare({"w": "W", "scale": object()})
