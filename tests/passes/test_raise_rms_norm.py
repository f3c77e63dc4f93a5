"""`raise-rms-norm`: every numbered case of the pass, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import pytest

import qgraph as qg
from qgraph.ir import Node, Value
from qgraph.passes import RaiseRmsNorm
from qgraph.rewrite.rewriter import rewrite_each
from tests.support import raising
from tests.support.raising import DTYPES, check, left_alone, ops, raised, random, text

EPS = 1e-5
NORM = "fast.rms_norm"


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 1, 16), (2, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_case_1_with_a_weight(dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    x, w = random(*shape, dtype=dtype), random(shape[-1], seed=1, dtype=dtype)
    expected = raising.rms_norm(x, w, EPS)
    check(lambda x, w: mx.fast.rms_norm(x, w, EPS), x, w, becomes=[NORM], like=expected)


@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_case_1_dtypes_mixed(dtype: mx.Dtype, weight: mx.Dtype) -> None:
    x, w = random(2, 3, 8, dtype=dtype), random(8, seed=1, dtype=weight)
    graph = qg.from_mlx(lambda x, w: mx.fast.rms_norm(x, w, EPS), x, w)
    after = raised(graph)
    assert set(ops(after)) <= {NORM, "astype"}
    program = qg.compile(after, passes=[], target="cpu")
    assert mx.array_equal(program(x, w), mx.fast.rms_norm(x, w, EPS))


def test_text() -> None:
    graph = qg.from_mlx(nn.RMSNorm(8), mx.ones((2, 8), mx.float16), name="f")
    before = (
        "graph f(x: f16[2,8]) -> f32[2,8]\n"
        "  %0: f32[2,8] = astype(x) {dtype=f32}\n"
        "  %1: f32[2,8] = square(%0)\n"
        "  %2: f32[2,1] = sum(%1) {axis=(1,), keepdims=True}\n"
        "  %3: f32[2,1] = broadcast_to(0.125) {shape=(2, 1)}\n"
        "  %4: f32[2,1] = multiply(%2, %3)\n"
        "  %5: f32[2,1] = broadcast_to(1e-05) {shape=(2, 1)}\n"
        "  %6: f32[2,1] = add(%4, %5)\n"
        "  %7: f32[2,1] = rsqrt(%6)\n"
        "  %8: f32[2,8] = broadcast_to(%7) {shape=(2, 8)}\n"
        "  %9: f32[2,8] = multiply(%0, %8)\n"
        "  %10: f32[2,8] = broadcast_to(@weight) {shape=(2, 8)}\n"
        "  %11: f32[2,8] = multiply(%9, %10)\n"
        "  return %11"
    )
    assert text(graph) == before
    assert text(raised(graph)) == (
        "graph f(x: f16[2,8]) -> f32[2,8]\n"
        "  %0: f32[2,8] = fast.rms_norm(x, @weight) {eps=1e-05}\n"
        "  return %0"
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_case_2_without_a_weight(dtype: mx.Dtype) -> None:
    x = random(2, 3, 8, dtype=dtype)
    expected = raising.rms_norm(x, None, 1e-6)
    check(lambda x: mx.fast.rms_norm(x, None, 1e-6), x, becomes=[NORM], like=expected)


def test_case_3_one_tensor_for_several_weights() -> None:
    def fn(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, a, EPS) @ mx.fast.rms_norm(x, b, EPS).T

    x, a, b = random(4, 8), random(8, seed=1), random(8, seed=2)
    expected = raising.rms_norm(x, a, EPS) @ raising.rms_norm(x, b, EPS).T
    check(fn, x, a, b, becomes=[NORM, NORM, "transpose", "matmul"], like=expected)


def test_near_miss_1_other_formulas() -> None:
    x, w = random(4, 8), random(8, seed=1)
    square = lambda x: mx.square(x)  # noqa: E731
    left_alone(lambda x: x * mx.rsqrt(square(x).mean(0, keepdims=True) + EPS), x)
    left_alone(lambda x: x / mx.sqrt(square(x).mean(-1, keepdims=True) + EPS), x)
    left_alone(lambda x: x * (mx.rsqrt(square(x).mean(-1, keepdims=True)) + EPS), x)
    left_alone(lambda x: x * mx.rsqrt(square(x).mean(-1, keepdims=True) - EPS), x)
    left_alone(lambda x: x * mx.rsqrt(square(x).sum(-1, keepdims=True) + EPS), x)
    left_alone(lambda x, w: w * mx.rsqrt(square(x).mean(-1, keepdims=True) + EPS), x, random(4, 8))
    half = x.astype(mx.float16)
    left_alone(lambda x: x * mx.rsqrt(square(x).mean(-1, keepdims=True) + EPS), half)
    assert w.size == 8


def test_near_miss_1_a_formula_that_is_mlx_s_own_is_raised() -> None:
    def by_hand(x: mx.array) -> mx.array:
        return x * mx.rsqrt(mx.square(x).mean(-1, keepdims=True) + EPS)

    check(by_hand, random(4, 8), becomes=[NORM])


def test_near_miss_2_weights_of_a_model_s_own() -> None:
    x, w = random(4, 8), random(8, seed=1)
    gemma = check(
        lambda x, w: mx.fast.rms_norm(x, 1.0 + w, EPS),
        x, w,
        becomes=["broadcast_to", "add", NORM],
        like=raising.rms_norm(x, 1.0 + w, EPS),
    )  # fmt: skip
    assert gemma.outputs[0].node.op == NORM
    check(
        lambda x, w: mx.fast.rms_norm(x, None, EPS) * (1.0 + w[:4, None]),
        x, w,
        becomes=[NORM, "getitem", "expand_dims", "broadcast_to", "add", "broadcast_to", "multiply"],
        like=raising.rms_norm(x, None, EPS) * (1.0 + raising.wide(w)[:4, None]),
    )  # fmt: skip
    check(
        lambda x, w: w * mx.fast.rms_norm(x, None, EPS),
        x, w,
        becomes=["broadcast_to", NORM, "multiply"],
        like=raising.rms_norm(x, w, EPS),
    )  # fmt: skip


def test_near_miss_3_read_without_the_weight_too() -> None:
    def fn(x: mx.array, w: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, w, EPS) + mx.tanh(mx.fast.rms_norm(x, None, EPS))

    x, w = random(4, 8), random(8, seed=1)
    after = check(fn, x, w, becomes=[NORM, "broadcast_to", "multiply", "tanh", "add"])
    assert after.nodes[0].args["weight"] is None


def test_the_normalized_tensor_is_a_result_too() -> None:
    def fn(x: mx.array, w: mx.array) -> tuple[mx.array, mx.array]:
        return mx.fast.rms_norm(x, w, EPS), mx.fast.rms_norm(x, None, EPS)

    x, w = random(4, 8), random(8, seed=1)
    after = raised(qg.from_mlx(fn, x, w))
    assert ops(after) == [NORM, "broadcast_to", "multiply"]
    for ours, theirs in zip(
        qg.compile(after, passes=[], target="cpu")(x, w), fn(x, w), strict=True
    ):
        assert mx.array_equal(ours, theirs)


def test_in_a_loop() -> None:
    norm = nn.RMSNorm(8)
    graph = qg.trace(
        lambda x: qg.fori_loop(0, 3, lambda i, h: h + qg.call(norm, h), x), qg.spec((2, 8))
    )
    after = raised(graph)
    assert ops(after) == ["fori_loop", NORM, "add"]
    x = random(2, 8)
    expected = x
    for _ in range(3):
        expected = expected + norm(expected)
    assert mx.array_equal(qg.compile(after, passes=[], target="cpu")(x), expected)


def test_what_it_says() -> None:
    graph = qg.from_mlx(nn.RMSNorm(8), mx.ones((2, 8)), name="f")
    plan = qg.optimize(graph, target="cpu")
    (entry,) = [e for e in plan.ledger() if e.made_by == "raise-rms-norm"]
    assert (entry.decision, entry.what, entry.name) == (
        "rewritten", "fast.rms_norm of f32[2,8]", "weight",
    )  # fmt: skip
    assert plan.graph.nodes[-1].origin.made_by == "raise-rms-norm"
    plan.check(mx.ones((2, 8)))


def test_contract() -> None:
    assert RaiseRmsNorm(qg.target.as_target("cpu")).contract == "exact"
    plan = qg.optimize(qg.from_mlx(nn.RMSNorm(8), mx.ones((2, 8))), target="cpu")
    assert {s.contract for s in plan.steps if s.name.startswith("raise-")} == {"exact"}


def test_nodes_whose_stream_the_user_chose_are_left() -> None:
    graph = qg.from_mlx(lambda x: mx.fast.rms_norm(x, None, EPS), random(4, 8))

    def move(node: Node) -> Sequence[Value] | None:
        return node.replace(stream="cpu").outputs if node.op == "rsqrt" else None

    moved = rewrite_each(graph, move, "")
    assert ops(RaiseRmsNorm()(graph)) == [NORM]
    assert RaiseRmsNorm()(moved) is moved
