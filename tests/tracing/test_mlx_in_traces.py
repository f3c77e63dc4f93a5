"""Functions of MLX itself that a traced function calls: `mx.checkpoint`, and numbers at random."""

from __future__ import annotations

import warnings
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import qgraph as qg

X = mx.array([[1.0, 2.0], [3.0, 4.0]])
CHECKPOINT = mx.checkpoint


def test_a_checkpoint_of_tensors_is_the_function() -> None:
    def fn(x: Any, w: Any) -> Any:
        inside = mx.checkpoint(lambda x, w: {"y": qg.tanh(x) * w})
        return inside(x, w=w)["y"] + mx.checkpoint(mx.exp)(X)  # type: ignore[arg-type]

    wanted = np.tanh(np.array(X)) * 3 + np.exp(np.array(X))
    np.testing.assert_allclose(qg.compile(fn, X, X)(X, mx.full((2, 2), 3.0)), wanted, rtol=1e-6)
    assert mx.checkpoint is CHECKPOINT


def drawn(x: Any) -> Any:
    return x + mx.random.normal((2,))


def dropped(x: Any) -> Any:
    return nn.Dropout(0.5)(x)


def in_a_loop(x: Any) -> Any:
    return qg.fori_loop(0, 2, lambda i, h: h * mx.random.uniform(shape=(2,)), x)


@pytest.mark.parametrize("fn", [drawn, dropped, in_a_loop])
def test_numbers_drawn_while_tracing_are_told(fn: Any) -> None:
    with pytest.warns(UserWarning, match=f"{fn.__name__} draws random numbers .*qg.random") as told:
        program = qg.compile(fn, X)
    assert (told[0].filename, told[0].lineno) == (__file__, fn.__code__.co_firstlineno)
    assert mx.array_equal(program(X), program(X))


@pytest.mark.parametrize(
    "module", [nn.Dropout(0.5), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))], ids=["own", "in"]
)
def test_dropout_of_an_import_is_told(module: nn.Module) -> None:
    for make in (
        lambda: qg.compile(module, X),
        lambda: qg.compile(lambda x: qg.call(module, x), X),
    ):
        with pytest.warns(UserWarning, match=r"model.eval\(\) switches nn.Dropout off") as told:
            make()
        assert len(told) == 1
        assert told[0].filename == __file__


def test_numbers_by_a_key_and_modules_in_inference_say_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
    mx.random.seed(3)

    def fn(x: Any, key: Any) -> Any:
        noise = mx.random.normal((2,), key=mx.random.key(0))
        return qg.call(model, x) + noise + qg.random.normal((2,), key=key)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = qg.compile(fn, X, mx.random.key(0))
    a, b = (program(X, mx.random.key(seed)) for seed in (1, 2))
    assert not mx.array_equal(a, b)
