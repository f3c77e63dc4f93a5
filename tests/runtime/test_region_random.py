"""Random chains of what a region holds, with loops: region against body against NumPy's float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qgraph as qg
from tests.runtime.test_region_ops import EPSILON, both_ways, error
from tests.support import region_cases as cases
from tests.support.arrays import to_numpy
from tests.support.compiler import needs_compiler

pytestmark = needs_compiler

SIZE = 24  # enough for squares of 16 and vectors of 16, and no multiple of them
PICKS = np.array([5, 0, 23, 5, -1, 7, 8, 9] * 3)
TWICE = np.array([3, 3, 1])
TAPS = np.random.default_rng(3).normal(size=(SIZE, 3, 1)).astype(np.float32) / 3
Function = Callable[[Any], Any]


def softmax(x: Any, axis: int) -> Any:
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def added(x: Any) -> Any:
    made = x.copy()
    np.add.at(made, TWICE, x[:3])
    return made


def by_channel(x: Any) -> Any:
    wide = np.pad(x, ((1, 1), (0, 0)))
    return sum(wide[i : i + SIZE] * TAPS[:, i, 0].astype(np.float64) for i in range(3))


def convolved(x: Any) -> Any:
    return qg.conv1d(x[None], mx.array(TAPS).astype(x.dtype), padding=1, groups=SIZE)[0]


STEPS: dict[str, tuple[Function, Function]] = {
    "tanh": (lambda x: qg.tanh(x * 1.5), lambda x: np.tanh(x * 1.5)),
    "centred": (lambda x: x - qg.mean(x, axis=0), lambda x: x - x.mean(axis=0)),
    "spread": (lambda x: x / (1 + qg.var(x, axis=0)), lambda x: x / (1 + x.var(axis=0))),
    "largest": (lambda x: x - qg.max(x, axis=0), lambda x: x - x.max(axis=0)),
    "least of all": (lambda x: x - qg.min(x), lambda x: x - x.min()),
    "softmax of columns": (lambda x: qg.softmax(x, axis=0), lambda x: softmax(x, 0)),
    "softmax of rows": (lambda x: qg.softmax(x, axis=1), lambda x: softmax(x, 1)),
    "summed down": (lambda x: qg.cumsum(x, axis=0) * 0.2, lambda x: np.cumsum(x, axis=0) * 0.2),
    "summed along": (lambda x: qg.cumsum(x, axis=1) * 0.2, lambda x: np.cumsum(x, axis=1) * 0.2),
    "largest so far": (
        lambda x: qg.cummax(x, axis=1), lambda x: np.maximum.accumulate(x, axis=1)),
    "across": (lambda x: x + qg.transpose(x) * 0.5, lambda x: x + x.T * 0.5),
    "product": (lambda x: qg.tanh(x @ qg.transpose(x)), lambda x: np.tanh(x @ x.T)),
    "einsum": (
        lambda x: qg.tanh(qg.einsum("ij,kj->ik", x, x)), lambda x: np.tanh(x @ x.T)),
    "rows taken": (lambda x: x[mx.array(PICKS)], lambda x: x[PICKS]),
    "columns taken": (lambda x: x[:, mx.array(PICKS)], lambda x: x[:, PICKS]),
    "added up": (lambda x: x.at[mx.array(TWICE)].add(x[:3]), added),
    "sorted": (lambda x: qg.sort(x, axis=1), lambda x: np.sort(x, axis=1)),
    "shifted": (
        lambda x: qg.concatenate([x[:, 1:], x[:, :1]], axis=1), lambda x: np.roll(x, -1, axis=1)),
    "best of each": (
        lambda x: x - qg.take_along_axis(x, qg.argmax(x, axis=0, keepdims=True), axis=0),
        lambda x: x - x.max(axis=0)),
    "by channel": (convolved, by_channel),
    "norm": (
        lambda x: qg.fast.rms_norm(x, None, 1e-5),
        lambda x: x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)),
}  # fmt: skip


def chains(depth: int = 0) -> st.SearchStrategy[tuple[Any, ...]]:
    step: st.SearchStrategy[Any] = st.sampled_from(list(STEPS))
    if depth < 2:
        inner = chains(depth + 1)
        loops = st.tuples(st.sampled_from(["fori", "while", "scan"]), st.integers(0, 2), inner)
        step = st.one_of(step, step, loops, st.tuples(st.just("cond"), st.booleans(), inner))
    return st.lists(step, min_size=1, max_size=4).map(tuple)


def traced(chain: tuple[Any, ...], x: Any) -> Any:
    for step in chain:
        match step:
            case ("fori", turns, inner):
                x = qg.fori_loop(0, turns, lambda i, h, inner=inner: traced(inner, h), x)
            case ("while", turns, inner):
                x, _ = qg.while_loop(
                    lambda c, turns=turns: c[1] < turns,
                    lambda c, inner=inner: (traced(inner, c[0]), c[1] + 1), (x, mx.array(0)),
                )  # fmt: skip
            case ("scan", turns, inner):
                weights = mx.arange(1, turns + 1).astype(x.dtype)

                def turn(h: Any, w: Any, inner: Any = inner) -> tuple[Any, Any]:
                    h = traced(inner, h) / w
                    return h, h[0]

                last, rows = qg.scan(turn, x, weights)
                x = last + (qg.sum(rows, axis=0) if turns else 0)
            case ("cond", yes, inner):
                pred = qg.sum(x) > (-1e30 if yes else 1e30)
                x = qg.cond(pred, lambda h, inner=inner: traced(inner, h), lambda h: h * 0.5, x)
            case name:
                x = STEPS[name][0](x)
    return x


def in_numpy(chain: tuple[Any, ...], x: Any) -> Any:
    for step in chain:
        match step:
            case ("fori" | "while", turns, inner):
                for _ in range(turns):
                    x = in_numpy(inner, x)
            case ("scan", turns, inner):
                rows = np.zeros(SIZE)
                for w in range(1, turns + 1):
                    x = in_numpy(inner, x) / w
                    rows = rows + x[0]
                x = x + rows
            case ("cond", yes, inner):
                x = in_numpy(inner, x) if yes else x * 0.5
            case name:
                x = STEPS[name][1](x)
    return x


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(chain=chains())
def test_random_chains(dtype: mx.Dtype, chain: tuple[Any, ...]) -> None:
    x = cases.numbers(SIZE, SIZE, seed=4, dtype=dtype)
    exact = in_numpy(chain, to_numpy(x).astype(np.float64))
    ((ours, theirs),) = both_ways(lambda x: traced(chain, x) * 1, x)
    assert error(ours, exact) <= 3 * error(theirs, exact) + 16 * EPSILON[dtype]
