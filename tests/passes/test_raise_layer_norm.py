"""`raise-layer-norm`: every numbered case of the pass, and what it must leave alone."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

import qgraph as qg
from tests.support import raising
from tests.support.raising import DTYPES, check, left_alone, ops, raised, random, text

EPS = 1e-5
NORM = "fast.layer_norm"


@pytest.mark.parametrize("parts", ["", "weight", "bias", "weight bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_case_1_every_form(dtype: mx.Dtype, parts: str) -> None:
    x = random(2, 3, 8, dtype=dtype) + 1
    w = random(8, seed=1, dtype=dtype) if "weight" in parts else None
    b = random(8, seed=2, dtype=dtype) if "bias" in parts else None
    expected = raising.layer_norm(x, w, b, EPS)
    given = [a for a in (w, b) if a is not None]

    def fn(x: mx.array, one: mx.array | None = None, two: mx.array | None = None) -> mx.array:
        weight, bias = (one, two) if "weight" in parts else (None, one)
        return mx.fast.layer_norm(x, weight, bias, EPS)

    check(fn, x, *given, becomes=[NORM], like=expected)


@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_case_1_dtypes_mixed(dtype: mx.Dtype, weight: mx.Dtype) -> None:
    x = random(2, 8, dtype=dtype)
    w, b = (random(8, seed=s, dtype=weight) for s in (1, 2))
    graph = qg.from_mlx(lambda x, w, b: mx.fast.layer_norm(x, w, b, EPS), x, w, b)
    after = raised(graph)
    assert set(ops(after)) <= {NORM, "astype"}
    program = qg.compile(after, passes=[], target="cpu")
    assert mx.array_equal(program(x, w, b), mx.fast.layer_norm(x, w, b, EPS))


def test_text() -> None:
    graph = qg.from_mlx(nn.LayerNorm(8), mx.ones((2, 8)), name="f")
    assert text(graph) == (
        "graph f(x: f32[2,8]) -> f32[2,8]\n"
        "  %0: f32[2,1] = sum(x) {axis=(1,), keepdims=True}\n"
        "  %1: f32[2,1] = broadcast_to(0.125) {shape=(2, 1)}\n"
        "  %2: f32[2,1] = multiply(%0, %1)\n"
        "  %3: f32[2,8] = broadcast_to(%2) {shape=(2, 8)}\n"
        "  %4: f32[2,8] = subtract(x, %3)\n"
        "  %5: f32[2,8] = square(%4)\n"
        "  %6: f32[2,1] = sum(%5) {axis=(1,), keepdims=True}\n"
        "  %7: f32[2,1] = multiply(%6, %1)\n"
        "  %8: f32[2,1] = broadcast_to(1e-05) {shape=(2, 1)}\n"
        "  %9: f32[2,1] = add(%7, %8)\n"
        "  %10: f32[2,1] = rsqrt(%9)\n"
        "  %11: f32[2,8] = broadcast_to(%10) {shape=(2, 8)}\n"
        "  %12: f32[2,8] = multiply(%4, %11)\n"
        "  %13: f32[2,8] = broadcast_to(@weight) {shape=(2, 8)}\n"
        "  %14: f32[2,8] = multiply(%12, %13)\n"
        "  %15: f32[2,8] = broadcast_to(@bias) {shape=(2, 8)}\n"
        "  %16: f32[2,8] = add(%14, %15)\n"
        "  return %16"
    )
    assert text(raised(graph)) == (
        "graph f(x: f32[2,8]) -> f32[2,8]\n"
        "  %0: f32[2,8] = fast.layer_norm(x, @weight, @bias) {eps=1e-05}\n"
        "  return %0"
    )


def test_case_2_one_tensor_for_several_weights() -> None:
    def fn(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, a, b, EPS) @ mx.fast.layer_norm(x, b, a, EPS).T

    x, a, b = random(4, 8), random(8, seed=1), random(8, seed=2)
    expected = raising.layer_norm(x, a, b, EPS) @ raising.layer_norm(x, b, a, EPS).T
    check(fn, x, a, b, becomes=[NORM, NORM, "transpose", "matmul"], like=expected)


def test_near_miss_1_other_formulas() -> None:
    x = random(4, 8)

    def over_rows(x: mx.array) -> mx.array:
        return (x - x.mean(0, keepdims=True)) * mx.rsqrt(mx.var(x, 0, keepdims=True) + EPS)

    def two_passes_differ(x: mx.array) -> mx.array:
        centred = x - x.mean(-1, keepdims=True)
        return centred * mx.rsqrt(mx.square(x).mean(-1, keepdims=True) + EPS)

    def unbiased(x: mx.array) -> mx.array:
        centred = x - x.mean(-1, keepdims=True)
        return centred * mx.rsqrt(mx.square(centred).sum(-1, keepdims=True) / 7 + EPS)

    for fn in (over_rows, two_passes_differ, unbiased):
        left_alone(fn, x)


def test_near_miss_2_read_without_the_bias_too() -> None:
    def fn(x: mx.array, w: mx.array, b: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, w, b, EPS) * mx.tanh(mx.fast.layer_norm(x, w, None, EPS))

    x, w, b = random(4, 8), random(8, seed=1), random(8, seed=2)
    after = check(fn, x, w, b, becomes=[NORM, "broadcast_to", "add", "tanh", "multiply"])
    assert after.nodes[0].operand("weight") is after.inputs[1]


def test_a_weight_of_two_axes_stays_a_product() -> None:
    def per_head(x: mx.array, w: mx.array) -> mx.array:
        return w * mx.fast.layer_norm(x, None, None, EPS)

    x, w = random(2, 4, 8), random(4, 8, seed=1)
    expected = raising.layer_norm(x, None, None, EPS) * raising.wide(w)
    check(per_head, x, w, becomes=["broadcast_to", NORM, "multiply"], like=expected)
