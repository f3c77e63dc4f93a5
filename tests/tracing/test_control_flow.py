"""Loops and branches: nested in any way, over trees, with counts known late."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.analysis.verify import verify
from qgraph.errors import ControlFlowError, TraceError
from tests.support.arrays import to_numpy

W = mx.random.normal((8, 8), key=mx.random.key(0)) * 0.3
X = mx.random.normal((2, 8), key=mx.random.key(1))


def agree(fn: Any, *args: mx.array) -> None:
    """The traced function, as written and optimized, gives what it gives untraced."""
    expected = qg.tree.flatten(fn(*args))[0]
    graph = qg.trace(fn, *args)
    verify(graph)
    for passes in ([], None):
        results = qg.tree.flatten(qg.compile(graph, passes=passes, target="cpu")(*args))[0]
        for actual, wanted in zip(results, expected, strict=True):
            np.testing.assert_allclose(to_numpy(actual), to_numpy(wanted), rtol=1e-5, atol=1e-6)


def test_fori_loop_over_a_tree() -> None:
    def fn(x: Any) -> Any:
        def body(i: Any, carry: Any) -> Any:
            return {"h": qg.tanh(carry["h"] @ W) + i, "parts": [carry["parts"][0] + 1]}

        return qg.fori_loop(1, 4, body, {"h": x, "parts": [mx.array(0)]})

    agree(fn, X)


@pytest.mark.parametrize("count", [0, 1, 5, 300])
def test_trip_counts(count: int) -> None:
    agree(lambda x: qg.fori_loop(0, count, lambda i, h: qg.tanh(h @ W), x), X)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_count_known_at_run_time(count: int) -> None:
    def fn(x: Any, n: Any) -> Any:
        return qg.fori_loop(0, n, lambda i, h: qg.tanh(h @ W), x)

    agree(fn, X, mx.array(count))


def test_scan_forwards_backwards_and_without_xs() -> None:
    xs = mx.random.normal((5, 2, 8), key=mx.random.key(2))
    for reverse in (False, True):
        agree(
            lambda x, xs, r=reverse: qg.scan(lambda c, s: (c @ W + s, c.sum()), x, xs, reverse=r),
            X,
            xs,
        )
    agree(lambda x: qg.scan(lambda c, _: (c * 0.5, c), x, length=3), X)


def test_scan_of_no_turns() -> None:
    graph = qg.trace(lambda x: qg.scan(lambda c, _: (c + 1, c), x, length=0), X)
    carry, ys = qg.compile(graph)(X)
    assert mx.array_equal(carry, X)
    assert ys.shape == (0, 2, 8)


def test_scan_too_long_to_unroll() -> None:
    xs = mx.random.normal((3000, 2), key=mx.random.key(2))
    agree(lambda xs: qg.scan(lambda c, x: (c * 0.9 + x, c), mx.zeros(2), xs), xs)


def test_while_loop_and_cond_nested() -> None:
    def fn(x: Any) -> Any:
        def body(h: Any) -> Any:
            h = qg.cond(qg.sum(h) > 0, lambda h: h @ W, lambda h: qg.abs(h) + X, h)
            return qg.fori_loop(0, 2, lambda i, h: h * 1.5, h)

        return qg.while_loop(lambda h: qg.max(qg.abs(h)) < 50, body, x)

    agree(fn, X)


def test_cond_runs_one_branch_only() -> None:
    def fn(x: Any) -> Any:
        endless = lambda x: qg.while_loop(lambda h: qg.all(h == h), lambda h: h, x)  # noqa: E731
        return qg.cond(qg.sum(x) > 1e9, endless, lambda x: x + 1, x)

    assert mx.array_equal(qg.compile(fn, qg.spec(X.shape))(X), X + 1)


def test_cond_in_a_loop_in_a_loop() -> None:
    def fn(x: Any) -> Any:
        def inner(j: Any, h: Any) -> Any:
            return qg.cond(j % 2 == 0, lambda h: h + W[0], lambda h: h * 0.5, h)

        return qg.fori_loop(0, 3, lambda i, h: qg.fori_loop(0, i + 1, inner, h), x)

    agree(fn, X)


def test_bodies_are_closed() -> None:
    outer = qg.tensor(mx.ones((8,)), "shift")

    def fn(x: Any) -> Any:
        y = x * 3
        return qg.fori_loop(0, 2, lambda i, h: h @ W + y[0] + outer, x)

    graph = qg.trace(fn, X)
    loop = graph.nodes[-1]
    assert len(loop.args["invariants"]) == 3
    inside = {v.node for v in loop.bodies[0].inputs} | set(loop.bodies[0].nodes)
    assert all(v.node in inside for n in loop.bodies[0].nodes for v in n.inputs)


def test_a_changing_type_is_shown_with_both_types() -> None:
    with pytest.raises(ControlFlowError) as caught:
        qg.trace(
            lambda x: qg.fori_loop(0, 2, lambda i, c: {"h": c["h"].astype(mx.float16)}, {"h": x}), X
        )
    assert "carry.h goes in as f32[2,8] and comes out as f16[2,8]" in str(caught.value)
    assert "its dtype changes" in str(caught.value)
    with pytest.raises(ControlFlowError, match=r"goes in as f32\[2,8\].*f32\[4,8\].*shape"):
        qg.trace(
            lambda x: qg.while_loop(lambda h: h.sum() > 0, lambda h: qg.concatenate([h, h]), x), X
        )


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda x: qg.fori_loop(0, 2, lambda i, h: (h, h), x), "another"),
        (lambda x: qg.fori_loop(0, x, lambda i, h: h, x), "bound"),
        (lambda x: qg.while_loop(lambda h: h, lambda h: h, x), "condition gives"),
        (lambda x: qg.cond(x, lambda h: h, lambda h: h, x), "pred is f32"),
        (lambda x: qg.cond(x.sum() > 0, lambda h: h, lambda h: h[0], x), "when true"),
        (lambda x: qg.cond(x.sum() > 0, lambda h: h, lambda h: (h,), x), "different trees"),
        (lambda x: qg.scan(lambda c, s: c, x, x), "no pair"),
        (lambda x: qg.scan(lambda c, s: (c, c), x), "length"),
        (lambda x: qg.scan(lambda c, s: (c, c), x, (x, x.T)), "first axes"),
        (lambda x: qg.fori_loop(0, 2, lambda i, h: h, "text"), "cannot carry"),
    ],
)
def test_misuse(fn: Any, words: str) -> None:
    with pytest.raises(ControlFlowError) as caught:
        qg.trace(fn, X)
    assert words in str(caught.value)
    assert "test_control_flow.py" in str(caught.value)


def test_a_leak_from_a_body_is_refused() -> None:
    kept = []

    def fn(x: Any) -> Any:
        qg.fori_loop(0, 2, lambda i, h: kept.append(h) or h, x)
        return kept[0] + 1

    with pytest.raises(TraceError, match="after that trace ended"):
        qg.trace(fn, X)


def test_bounds_are_whole_numbers() -> None:
    for bound in (2.5, "3", mx.array(2.5)):
        for x in (mx.ones(2), qg.tensor(mx.ones(2))):
            with pytest.raises(ControlFlowError, match="a bound is"):
                qg.fori_loop(0, bound, lambda i, h: h + 1, x)
    assert qg.fori_loop(np.int64(0), mx.array(2, mx.uint8), lambda i, h: h + 1, mx.array(0)) == 2
