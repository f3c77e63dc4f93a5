"""`lint`: what is costly as written, where, and how often."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.inspection.lint import explained, lint

W = mx.ones((64, 64))
Q = mx.quantize(W)


def test_a_constant_quantized_in_nested_loops() -> None:
    def fn(x: Any) -> Any:
        def inner(j: Any, h: Any) -> Any:
            return qg.quantized_matmul(h, W)

        return qg.fori_loop(0, 4, lambda i, h: qg.fori_loop(0, 16, inner, h), x)

    (finding,) = lint(qg.trace(fn, qg.spec((1, 64))))
    assert finding.times == 64
    assert finding.bytes == 64 * (64 * 64 * 4 + sum(p.nbytes for p in Q))
    text = str(finding)
    assert text.startswith("quantize of a constant inside a loop, test_lint.py:")
    assert "64 times" in text


def test_a_dense_weight_for_a_product() -> None:
    (finding,) = lint(qg.trace(lambda x: x @ qg.dequantize(*Q).T, qg.spec((1, 64))))
    assert str(finding).startswith("dequantize of a weight, dense, for a product, test_lint.py:")
    assert finding.times == 1


def test_the_costliest_comes_first_and_counts_may_be_unknown() -> None:
    def fn(x: Any, n: Any) -> Any:
        y = x @ qg.dequantize(*Q).T
        return qg.fori_loop(0, n, lambda i, h: qg.quantized_matmul(h, W), y)

    first, second = lint(qg.trace(fn, qg.spec((1, 64)), qg.spec((), mx.int32)))
    assert (first.times, second.times) == (1000, 1)
    assert "1000 times if its loops turn so often" in str(first)
    assert not second.guessed


def test_nothing_to_find() -> None:
    assert lint(qg.trace(lambda x: qg.quantized_matmul(x, *Q), qg.spec((1, 64)))) == []
    assert lint(qg.trace(lambda x, w: qg.quantize(w), qg.spec((1,)), qg.spec((64, 64)))) == []
    optimized = qg.optimize(qg.trace(lambda x: x @ qg.dequantize(*Q).T, qg.spec((1, 64)))).graph
    assert lint(optimized) == []


X = qg.spec((1, 64))
LOOP: dict[str, Callable[[Any, Any], Any]] = {
    "a parameter": lambda w, x: qg.fori_loop(0, 3, lambda i, h: qg.quantized_matmul(h, w), x),
    "an argument": lambda w, x: qg.scan(lambda h, _: (qg.quantized_matmul(h, w), h), x, length=3)[
        0
    ],
    "a value that changes with each turn": lambda w, x: qg.fori_loop(
        0, 3, lambda i, c: (qg.quantized_matmul(c[0], c[1]), c[1] * 0.5), (x, w)
    )[0],
}


@pytest.mark.parametrize("what", LOOP)
def test_what_is_quantized_in_a_loop(what: str) -> None:
    parameters = [0] if what == "a parameter" else []
    graph = qg.trace(LOOP[what], qg.spec((64, 64)), X, parameters=parameters)
    (finding,) = lint(graph)
    assert finding.what == f"quantize of {what} inside a loop"
    assert finding.times == 3
    (finding,) = explained([finding], qg.optimize(graph).ledger())
    word = {"a parameter": "prepared", "an argument": "hoisted"}.get(what, "kept")
    assert f"; {word} by optimize, " in str(finding)


def test_what_is_unpacked_for_a_few_rows() -> None:
    ids = qg.spec((2,), mx.int32)
    graph = qg.trace(lambda i: qg.dequantize(*Q)[i], ids)
    (finding,) = lint(graph)
    assert finding.what == "dequantize of a whole weight for a part of it"
    (finding,) = explained([finding], qg.optimize(graph).ledger())
    assert str(finding).endswith("; fused by optimize, into the getitem that reads it")


def test_views_stand_between_and_activations_are_not_weights() -> None:
    graph = qg.trace(lambda x: x @ qg.dequantize(*Q).reshape(8, 8, 64).reshape(64, 64).T, X)
    assert len(lint(graph)) == 1
    rounded = qg.trace(lambda x: qg.dequantize(*qg.quantize(x)) @ W, X)
    assert lint(rounded) == []


def test_a_refusal_is_told() -> None:
    graph = qg.trace(lambda x: x @ qg.dequantize(*Q)[:, :32], X)
    (finding,) = explained(lint(graph), qg.optimize(graph).ledger())
    assert "for a part of it" in finding.what
    assert finding.becomes == "kept by optimize, the getitem that reads it needs it dense"
    graph = qg.trace(lambda x: qg.einsum("mk,nk->m", x, qg.dequantize(*Q)), X)
    (finding,) = explained(lint(graph), qg.optimize(graph).ledger())
    assert "kept by optimize, the einsum that reads it did not fuse" in str(finding)
