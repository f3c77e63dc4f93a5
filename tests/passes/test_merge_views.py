"""`merge-views`: chains of views become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.passes import EliminateDeadCode, MergeViews
from tests.support.arrays import to_numpy

X = mx.arange(24).reshape(1, 4, 6)

MERGED: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "a transpose of one token": (
        lambda x: x.reshape(4, 1, 6).transpose(1, 0, 2).reshape(2, 12),
        ["%0: i32[2,12] = reshape(x) {shape=(2, 12)}"],
    ),
    "axes added and removed": (
        lambda x: qg.expand_dims(x, 0).squeeze(1)[None],
        ["%0: i32[1,1,4,6] = getitem(x)"],
    ),
    "back to where it began": (lambda x: qg.exp(x.reshape(24).reshape(1, 4, 6)), [
        "%0: f32[1,4,6] = exp(x)",
    ]),
}  # fmt: skip
LEFT: dict[str, Callable[[Any], Any]] = {
    "one view": lambda x: x.transpose(1, 0, 2),
    "a transpose that moves": lambda x: x.transpose(0, 2, 1).reshape(24),
    "a part": lambda x: x[:, 1:].reshape(18),
    "a broadcast": lambda x: qg.broadcast_to(x, (2, 4, 6)).reshape(48),
    "another stream": lambda x: qg.reshape(qg.reshape(x, (24,), stream="cpu"), (4, 6)),
}


def optimized(fn: Any) -> qg.Graph:
    return qg.optimize(qg.trace(fn, X, name="f"), passes=[MergeViews()], target="cpu").graph


@pytest.mark.parametrize("case", MERGED)
def test_merged(case: str) -> None:
    fn, expected = MERGED[case]
    graph = qg.optimize(
        qg.trace(fn, X, name="f"), passes=[MergeViews(), EliminateDeadCode()],
        target="cpu",
    ).graph  # fmt: skip
    lines = graph.format(origins=False).splitlines()
    assert [line.strip() for line in lines[1:-1]] == expected
    result = qg.compile(graph, passes=[], target="cpu")(X)
    np.testing.assert_array_equal(to_numpy(result), to_numpy(fn(X)))


@pytest.mark.parametrize("case", LEFT)
def test_left(case: str) -> None:
    graph = qg.trace(LEFT[case], X)
    assert MergeViews()(graph) is graph


def test_in_a_nested_loop() -> None:
    def fn(x: Any) -> Any:
        turn = lambda i, h: h.reshape(24).reshape(4, 6).reshape(1, 4, 6) + i  # noqa: E731
        return qg.fori_loop(0, 2, lambda _, h: qg.fori_loop(0, 3, turn, h), x)

    graph = optimized(fn)
    (body,) = [g for g, n in graph.walk() if n.op == "add"]
    assert body.nodes[-1].operand("a") in body.inputs
    result = qg.compile(graph, passes=[], target="cpu")(X)
    np.testing.assert_array_equal(to_numpy(result), to_numpy(X) + 2 * 3)


def test_what_is_prepared_stays_prepared() -> None:
    """Hoisting leaves a view of a view in the prepare step; a second run of the passes meets it."""
    s = mx.arange(256).astype(mx.float32) / 256

    def fn(x: Any, s: Any) -> Any:
        square = s.reshape(16, 16)
        return qg.fori_loop(0, 40, lambda _, c: qg.tanh(c * (square.reshape(1, 256) * 2)), x)

    x = mx.ones((1, 256))
    once = qg.optimize(qg.trace(fn, x, s, parameters=[1]), target="cpu").graph
    twice = qg.optimize(once, target="cpu").graph
    assert {n.stage for n in twice.nodes if n.op == "multiply"} == {"prepare"}
    program = qg.compile(twice, passes=[], target="cpu")
    np.testing.assert_allclose(to_numpy(program(x, s)), to_numpy(fn(x, s)), rtol=1e-5)
