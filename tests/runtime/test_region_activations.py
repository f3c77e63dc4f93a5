"""Products with what follows them as one step: which spellings are known, and which are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.runtime.regions.cpu.refs import h
from qgraph.runtime.regions.cpu.translation import translate
from tests.runtime.test_region_ops import agree
from tests.support import region_cases as cases
from tests.support.compiler import needs_compiler

pytestmark = needs_compiler
ROOT = math.sqrt(2)


def kinds(function: Callable[..., Any], *inputs: mx.array) -> list[int]:
    """The kinds of the steps that a function becomes, in order."""
    graph = qg.trace(function, *(qg.spec(x.shape, x.dtype) for x in inputs))
    return [step.kind for step in translate(graph, {}).schedule.steps]


def operands(dtype: mx.Dtype = mx.float32) -> list[mx.array]:
    """x (2, 5, 32), w (32, 48), bias (48,)."""
    shapes = ((2, 5, 32), (32, 48), (48,))
    return [cases.numbers(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": lambda x: qg.maximum(x, 0),
    "silu": lambda x: x * qg.sigmoid(x),
    "gelu": lambda x: x * (1 + qg.erf(x / ROOT)) / 2,
    "gelu, half first": lambda x: 0.5 * x * (1 + qg.erf(x * (1 / ROOT))),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_one_step_of_a_layer(name: str) -> None:
    def layer(x: Any, w: Any, bias: Any) -> Any:
        return ACTIVATIONS[name](x @ w + bias)

    assert kinds(layer, *operands()) == [h.MATMUL]
    agree(layer, *operands())


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_addmm_and_what_reshapes_lie_between(alpha: float) -> None:
    def layer(x: Any, w: Any, bias: Any) -> Any:
        sums = qg.addmm(bias, x.reshape(10, 32), w, alpha=alpha).reshape(2, 5, 48)
        return ACTIVATIONS["gelu"](sums).reshape(10, 48)

    def residual(x: Any, w: Any, bias: Any, y: Any) -> Any:
        return y + qg.addmm(bias, x.reshape(10, 32), w, alpha=alpha).reshape(2, 5, 48)

    more = [*operands(), cases.numbers(2, 5, 48, seed=7)]
    assert kinds(layer, *operands()) == kinds(residual, *more) == [h.MATMUL]
    agree(layer, *operands())
    agree(residual, *more)


NEAR: dict[str, Callable[[Any], Any]] = {
    "another factor": lambda x: x * (1 + qg.erf(x / 1.5)) / 2,
    "not one": lambda x: x * (2 + qg.erf(x / ROOT)) / 2,
    "no half": lambda x: x * (1 + qg.erf(x / ROOT)),
    "divided by x": lambda x: x * (1 + qg.erf(ROOT / x)) / 2,
    "not zero": lambda x: qg.maximum(x, 1),
    "read again": lambda x: x * (1 + qg.erf(x / ROOT)) / 2 + x,
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses(name: str) -> None:
    def layer(x: Any, w: Any) -> Any:
        return NEAR[name](x @ w)

    inputs = operands()[:2]
    assert kinds(layer, *inputs) == [h.MATMUL, h.ELEMENTWISE]
    agree(layer, *inputs)


def test_half_precision_keeps_the_graph_s_roundings() -> None:
    def layer(x: Any, w: Any) -> Any:
        return ACTIVATIONS["gelu"](x @ w)

    inputs = operands(mx.float16)[:2]
    assert kinds(layer, *inputs) == [h.MATMUL, h.ELEMENTWISE]
    agree(layer, *inputs)


def test_a_reshape_that_splits_columns_ends_the_step() -> None:
    def layer(x: Any, w: Any) -> Any:
        return qg.maximum((x @ w).reshape(2, 5, 6, 8), 0)

    inputs = operands()[:2]
    assert kinds(layer, *inputs) == [h.MATMUL, h.ELEMENTWISE]
    agree(layer, *inputs)
