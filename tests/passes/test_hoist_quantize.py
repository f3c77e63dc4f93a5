"""`hoist-quantize`: what moves out of loops and to which step, and what stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.analysis.verify import verify
from qgraph.ir import Graph
from qgraph.passes import EliminateCommonSubexpressions, EliminateDeadCode, HoistQuantize
from tests.support import reference
from tests.support.arrays import to_numpy

K = 64
W = mx.random.normal((K, K), key=mx.random.key(0)) / 8
X = mx.random.normal((2, K), key=mx.random.key(1))
PASSES = [HoistQuantize(), EliminateCommonSubexpressions(), EliminateDeadCode()]


def hoisted(fn: Callable[..., Any], *args: Any, **options: Any) -> Graph:
    """The traced function after hoisting; its numbers are bit for bit what they were."""
    graph = qg.trace(fn, *args, name="f", **options)
    plan = qg.optimize(graph, passes=PASSES, target="cpu")
    verify(plan.graph)
    arrays = [a for a in args if not isinstance(a, qg.types.Spec)]
    if len(arrays) == len(args):
        before = qg.tree.flatten(qg.compile(graph, passes=[], target="cpu")(*args))[0]
        after = qg.tree.flatten(qg.compile(plan.graph, passes=[], target="cpu")(*args))[0]
        for a, b in zip(before, after, strict=True):
            assert mx.array_equal(a, b, equal_nan=True)
    return plan.graph


def places(graph: Graph, op: str = "quantize") -> list[tuple[str, int]]:
    """For each node of `op`: the step it runs in, and how many loops and branches hold it."""
    found: list[tuple[str, int]] = []

    def visit(graph: Graph, depth: int) -> None:
        for node in graph.nodes:
            if node.op == op:
                found.append((node.stage, depth))
            for body in node.bodies:
                visit(body, depth + 1)

    visit(graph, 0)
    return found


def step(h: Any, w: Any = None, **settings: Any) -> Any:
    return qg.tanh(qg.quantized_matmul(h, W if w is None else w, **settings))


MODES = {
    "affine": {}, "mxfp4": {"mode": "mxfp4"}, "mxfp8": {"mode": "mxfp8"}, "nvfp4": {"mode": "nvfp4"}
}  # fmt: skip


# Cases 1 and 2: out of every kind of loop, to the pack step.
LOOPS: dict[str, Callable[[Any, Callable[[Any], Any]], Any]] = {
    "fori_loop": lambda x, f: qg.fori_loop(0, 3, lambda i, h: f(h), x),
    "scan": lambda x, f: qg.scan(lambda h, _: (f(h), h.sum()), x, length=3),
    "while_loop": lambda x, f: qg.while_loop(
        lambda c: c[1] < 3, lambda c: (f(c[0]), c[1] + 1), (x, mx.array(0))
    ),
    "cond": lambda x, f: qg.cond(x.sum() > 0, f, lambda h: h, x),
    "no loop": lambda x, f: f(x),
    "fori in scan": lambda x, f: qg.scan(
        lambda h, _: (qg.fori_loop(0, 2, lambda i, h: f(h), h), 0 * h.sum()), x, length=2
    ),
    "cond in fori": lambda x, f: qg.fori_loop(
        0, 2, lambda i, h: qg.cond(i > 0, f, lambda h: h * 2, h), x
    ),
    "fori in cond": lambda x, f: qg.cond(
        x.sum() > 0, lambda h: qg.fori_loop(0, 2, lambda i, h: f(h), h), lambda h: h, x
    ),
    "three deep": lambda x, f: qg.fori_loop(
        0, 2, lambda i, h: qg.while_loop(
            lambda c: c[1] < 2,
            lambda c: (qg.scan(lambda h, _: (f(h), 0 * h.sum()), c[0], length=2)[0], c[1] + 1),
            (h, mx.array(0)),
        )[0], x,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loop", LOOPS)
def test_constants_are_packed_once(loop: str, mode: str) -> None:
    graph = hoisted(lambda x: LOOPS[loop](x, lambda h: step(h, **MODES[mode])), X)
    assert places(graph) == [("pack", 0)]


@pytest.mark.parametrize("loop", LOOPS)
def test_parameters_are_prepared_once(loop: str) -> None:
    def fn(w: Any, x: Any) -> Any:
        return LOOPS[loop](x, lambda h: step(h, w))

    assert places(hoisted(fn, W, X, parameters=[0])) == [("prepare", 0)]


@pytest.mark.parametrize("loop", [name for name in LOOPS if "cond" not in name])
def test_what_is_known_at_run_time_leaves_the_loops(loop: str) -> None:
    graph = hoisted(lambda w, x: LOOPS[loop](x, lambda h: step(h, w)), W, X)
    assert places(graph) == [("run", 0)]


def test_text_before_and_after() -> None:
    graph = qg.trace(lambda x: qg.fori_loop(0, 2, lambda i, h: step(h), x), X, name="f")
    assert graph.format(origins=False) == (
        "graph f(x: f32[2,64]) -> f32[2,64]\n"
        "  %h: f32[2,64] = fori_loop[2](x; @W)\n"
        "    body(i: i32[], h: f32[2,64]; @W)\n"
        "      %0: u32[64,8], %1: f32[64,1], %2: f32[64,1] = quantize(@W) {bits=4, group_size=64}\n"
        "      %3: f32[2,64] = quantized_matmul(h, %0, %1, %2) {bits=4, group_size=64}\n"
        "      %4: f32[2,64] = tanh(%3)\n"
        "      yield %4\n"
        "  return %h"
    )
    plan = qg.optimize(graph, passes=PASSES)
    assert plan.graph.format(origins=False) == (
        "graph f(x: f32[2,64]) -> f32[2,64]\n"
        "  pack (once):\n"
        "    W_q: u32[64,8], W_s: f32[64,1], W_b: f32[64,1] = "
        "quantize(@W) {bits=4, group_size=64}\n"
        "  %h: f32[2,64] = fori_loop[2](x; W_q, W_s, W_b)\n"
        "    body(i: i32[], h: f32[2,64]; W_q, W_s, W_b)\n"
        "      %0: f32[2,64] = quantized_matmul(h, W_q, W_s, W_b) {bits=4, group_size=64}\n"
        "      %1: f32[2,64] = tanh(%0)\n"
        "      yield %1\n"
        "  return %h"
    )


@pytest.mark.parametrize("mode", ["affine", "nvfp4"])
def test_numbers_against_float64(mode: str) -> None:
    parts = [to_numpy(p) for p in mx.quantize(W, **MODES[mode])]
    group, bits = (64, 4) if mode == "affine" else (16, 4)
    dense = reference.dequantize(
        parts[0], parts[1], parts[2] if len(parts) > 2 else None, group, bits, mode
    )
    expected = to_numpy(X).astype(np.float64)
    for _ in range(3):
        expected = np.tanh(expected @ dense.T)
    program = qg.compile(
        lambda x: qg.fori_loop(0, 3, lambda i, h: step(h, **MODES[mode]), x), X, target="cpu"
    )
    assert reference.relative_error(to_numpy(program(X)), expected) < 1e-5


@pytest.mark.parametrize("count", [0, 1])
def test_loops_that_may_not_turn(count: int) -> None:
    def fn(x: Any, n: Any) -> Any:
        return qg.fori_loop(0, n, lambda i, h: step(h), x)

    assert places(hoisted(fn, X, mx.array(count))) == [("pack", 0)]


# Case 4: what a quantize is computed from goes with it.
def test_the_chain_before_a_quantize_goes_with_it() -> None:
    scale = mx.array([2.0])

    def fn(x: Any) -> Any:
        return qg.fori_loop(0, 2, lambda i, h: step(h, (qg.tensor(W) * scale).T), x)

    graph = hoisted(fn, X)
    assert places(graph) == [("pack", 0)]
    assert places(graph, "multiply") == places(graph, "transpose") == [("pack", 0)]


def test_a_dense_intermediate_that_is_read_inside_too_stays_inside() -> None:
    q = mx.quantize(W)

    def fn(x: Any) -> Any:
        def body(i: Any, h: Any) -> Any:
            dense = qg.dequantize(*q)
            return step(h, dense, bits=2) + h @ dense

        return qg.fori_loop(0, 2, body, x)

    graph = hoisted(fn, X)
    assert places(graph) == [("pack", 0)]
    assert sorted(places(graph, "dequantize")) == [("pack", 0), ("run", 1)]


# Case 5: anything else that does not grow.
def test_what_does_not_grow_leaves_the_loop() -> None:
    w = qg.spec((K, K))

    def fn(w: Any, x: Any) -> Any:
        return qg.fori_loop(0, 2, lambda i, h: h * qg.sum(w, axis=0), x)

    assert places(hoisted(fn, w, qg.spec((2, K))), "sum") == [("run", 0)]


def test_scales_are_cast_once() -> None:
    parts = mx.quantize(W.astype(mx.float16))

    def fn(x: Any) -> Any:
        def body(i: Any, h: Any) -> Any:
            w, *scales = parts
            return qg.tanh(qg.quantized_matmul(h, w, *(qg.astype(s, mx.float32) for s in scales)))

        return qg.fori_loop(0, 2, body, x)

    assert places(hoisted(fn, X), "astype") == [("pack", 0)] * 2


# What stays.
def stays(op: str, fn: Callable[..., Any], *args: Any) -> None:
    graph = hoisted(lambda *a: qg.fori_loop(0, 2, lambda i, h: fn(h, *a[1:]), a[0]), *args)
    assert places(graph, op) == [("run", 1)]


def test_a_dequantize_by_itself_stays() -> None:
    q = mx.quantize(W)
    stays("dequantize", lambda h: qg.tanh(h @ qg.dequantize(*q).T), X)
    graph = hoisted(lambda x: x @ qg.dequantize(*q).T, X)
    assert places(graph, "dequantize") == [("run", 0)]


def test_what_grows_stays() -> None:
    row = mx.ones((K,), mx.float16)
    stays("broadcast_to", lambda h: h + qg.broadcast_to(row, (2, K)), X)
    stays("astype", lambda h: h + qg.astype(row, mx.float32), X)
    stays("outer", lambda h: h @ qg.outer(row, row), X)
    stays("zeros", lambda h: h + qg.zeros((2, K)), X)


def test_random_ops_stay() -> None:
    key = mx.random.key(5)
    stays("random.normal", lambda h: h + qg.random.normal((K,), key=key), X)


def test_keep_stays() -> None:
    graph = hoisted(lambda x: qg.fori_loop(0, 2, lambda i, h: step(h, qg.keep(qg.tensor(W))), x), X)
    assert places(graph, "keep") == [("run", 1)]
    assert places(graph) == [("run", 1)]


def test_what_changes_in_the_loop_stays() -> None:
    def fn(w: Any, x: Any) -> Any:
        def body(i: Any, carry: Any) -> Any:
            w, h = carry
            return w * 0.9, step(h, w)

        return qg.fori_loop(0, 2, body, (w, x))

    assert places(hoisted(fn, W, X)) == [("run", 1)]


def test_a_weight_that_changes_in_the_outer_loop_leaves_the_inner_one() -> None:
    def fn(w: Any, x: Any) -> Any:
        def outer(i: Any, carry: Any) -> Any:
            w, h = carry
            return w * 0.9, qg.fori_loop(0, 3, lambda j, h: step(h, w), h)

        return qg.fori_loop(0, 2, outer, (w, x))

    assert places(hoisted(fn, W, X)) == [("run", 1)]


def test_a_branch_keeps_what_would_run_though_it_is_not_taken() -> None:
    def fn(w: Any, x: Any) -> Any:
        return qg.cond(x.sum() > 0, lambda h: step(h, w), lambda h: h, x)

    assert places(hoisted(fn, W, X)) == [("run", 1)]


def test_a_graph_without_anything_to_move_is_returned_as_it_is() -> None:
    graph = qg.trace(lambda x: qg.fori_loop(0, 2, lambda i, h: qg.tanh(h) + x, x), X)
    assert HoistQuantize()(graph) is graph


def test_the_same_weight_twice_is_packed_once() -> None:
    def fn(x: Any) -> Any:
        return qg.fori_loop(0, 2, lambda i, h: step(step(h)), x)

    assert places(hoisted(fn, X)) == [("pack", 0)]


def test_the_ledger_says_from_where_to_where() -> None:
    plan = qg.optimize(qg.trace(lambda x: qg.fori_loop(0, 2, lambda i, h: step(h), x), X))
    entries = [e for e in plan.ledger() if e.made_by == "hoist-quantize"]
    found = [(e.decision, e.name) for e in entries]
    assert found == [("hoisted", "W"), ("packed", "W")]
    assert all(str(e.origin).startswith("test_hoist_quantize.py:") for e in plan.ledger())
