"""A weight that is made dense outside of a loop fuses with the products inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from tests.support.fusion import FORMATS, Weight, check, ops, optimized, random, wide

K, TURNS = 128, 3
SQUARE, STACK = random(K, K) / 12, random(TURNS, K, K) / 12
X = random(2, K, seed=1)

Step = Callable[[Any], Any]


def turn(w: Any) -> Step:
    return lambda h: qg.tanh(h @ w)


def _carried(x: Any, w: Any) -> Any:
    return qg.fori_loop(0, TURNS, lambda i, c: (turn(c[1])(c[0]), c[1]), (x, w))[0]


def _nested(x: Any, w: Any) -> Any:
    inner = lambda h: qg.cond(qg.sum(h) < 1e9, turn(w), lambda h: h, h)  # noqa: E731
    return qg.fori_loop(0, 1, lambda i, h: qg.fori_loop(0, TURNS, lambda j, h: inner(h), h), x)


LOOPS: dict[str, Callable[[Any, Any], Any]] = {
    "fori_loop": lambda x, w: qg.fori_loop(0, TURNS, lambda i, h: turn(w.T)(h), x),
    "transposed outside": lambda x, w: (
        lambda t: qg.fori_loop(0, TURNS, lambda i, h: turn(t)(h), x)
    )(w.T.reshape(K, K)),
    "scan": lambda x, w: qg.scan(lambda h, _: (turn(w.T)(h), h[0]), x, length=TURNS)[0],
    "while_loop": lambda x, w: qg.while_loop(
        lambda c: c[1] < TURNS, lambda c: (turn(w.T)(c[0]), c[1] + 1), (x, mx.array(0))
    )[0],
    "carried": lambda x, w: _carried(x, w.T),
    "nested": lambda x, w: _nested(x, w.T),
    "both inside and outside": lambda x, w: qg.fori_loop(
        0, TURNS - 1, lambda i, h: turn(w.T)(h), turn(w.T)(x)
    ),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("origin", ["constant", "parameter"])
@pytest.mark.parametrize("name", LOOPS)
def test_loops(name: str, origin: str, form: str) -> None:
    weight = Weight(form, SQUARE)

    def fn(parts: Any, x: Any) -> Any:
        return LOOPS[name](x, weight.dequantize(parts, dtype=mx.float32))

    if origin == "parameter":
        plan, args = optimized(fn, weight.parts, X, parameters=[0]), [weight.parts, X]
    else:
        plan, args = optimized(lambda x: fn(weight.parts, x), X), [X]
    assert "quantized_matmul" in ops(plan.graph)
    assert not {"dequantize", "matmul"} & set(ops(plan.graph))
    expected = wide(X)
    for _ in range(TURNS):
        expected = np.tanh(expected @ weight.dense.T)
    check(plan, args, expected, 1e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_a_stack_made_dense_before_a_scan(form: str) -> None:
    weight = Weight(form, STACK)

    def fn(parts: Any, x: Any) -> Any:
        stack = weight.dequantize(parts, dtype=mx.float32)
        return qg.scan(lambda h, w: (turn(w.T)(h), h[0]), x, stack, reverse=True)

    plan = optimized(fn, weight.parts, X, parameters=[0])
    assert not {"dequantize", "matmul"} & set(ops(plan.graph))
    expected, rows = wide(X), []
    for w in weight.dense[::-1]:
        rows.insert(0, expected[0])
        expected = np.tanh(expected @ w.T)
    check(plan, [weight.parts, X], [expected, np.stack(rows)], 1e-5)


def test_a_tied_embedding() -> None:
    weight = Weight("nvfp4", random(96, K))

    def fn(tokens: Any) -> Any:
        table = weight.dequantize()

        def step(tokens: Any, _: Any) -> Any:
            h = qg.tanh(qg.take(table, tokens, axis=0))
            new = qg.argmax(h @ table.T, axis=-1).astype(mx.int32)
            return new, new

        return qg.scan(step, tokens, length=4)[1]

    tokens = mx.array([3, 7], dtype=mx.int32)
    plan = optimized(fn, tokens)
    assert "quantized_matmul" in ops(plan.graph)
    assert [n.output.shape for _, n in plan.graph.walk() if n.op == "dequantize"] == [(2, K)]


def test_a_branch() -> None:
    weight = Weight("mxfp8", SQUARE)

    def fn(x: Any) -> Any:
        w = weight.dequantize(dtype=mx.float32).T
        return qg.cond(x.sum() > 1e9, lambda h: h, turn(w), x)

    plan = optimized(fn, X)
    assert not {"dequantize", "matmul"} & set(ops(plan.graph))
    check(plan, [X], np.tanh(wide(X) @ weight.dense.T))


MISSES: dict[str, Callable[[Any, Any], Any]] = {
    "read dense inside": lambda x, w: qg.fori_loop(
        0, 2, lambda i, h: turn(w.T)(h) + qg.mean(w, axis=0), x
    ),
    "changed inside": lambda x, w: qg.fori_loop(
        0, 2, lambda i, c: (c[0] @ c[1], c[1] * 0.5), (x, w)
    ),
    "given back by a branch": lambda x, w: qg.cond(x.sum() > 0, lambda: w, lambda: w * 2.0),
    "columns inside": lambda x, w: qg.fori_loop(0, 2, lambda i, h: turn(w[:, :64].T)(h[:, :64]), x),
}


@pytest.mark.parametrize("name", MISSES)
def test_near_misses(name: str) -> None:
    weight = Weight("affine-4-32", SQUARE)
    graph = qg.trace(lambda x: MISSES[name](x, weight.dequantize()), X)
    plan = qg.optimize(graph, target="cpu")
    assert "dequantize" in [n.op for _, n in plan.graph.walk()]
    plan.check(X)


def test_the_ledger_says_where_it_went() -> None:
    weight = Weight("affine-4-32", SQUARE)
    packed = weight.parts
    plan = optimized(lambda x: LOOPS["scan"](x, weight.dequantize(packed)), X)
    (entry,) = [e for e in plan.ledger() if e.what.startswith("dequantize")]
    assert (entry.decision, entry.reason) == ("fused", "into the scan that multiplies by it")
