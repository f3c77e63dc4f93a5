"""`lint`: what is costly as written, where, and how often."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

import qgraph as qg
from qgraph.lint import lint

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


def test_nothing_to_find() -> None:
    assert lint(qg.trace(lambda x: qg.quantized_matmul(x, *Q), qg.spec((1, 64)))) == []
    assert lint(qg.trace(lambda x, w: qg.quantize(w), qg.spec((1,)), qg.spec((64, 64)))) == []
    optimized = qg.optimize(qg.trace(lambda x: x @ qg.dequantize(*Q).T, qg.spec((1, 64)))).graph
    assert lint(optimized) == []
