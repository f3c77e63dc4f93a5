"""`raise-attention`: every numbered case of the pass, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from tests.support import raising
from tests.support.raising import DTYPES, check, left_alone, ops, raised, random, text

ATTENTION = "fast.scaled_dot_product_attention"
SCALE = 0.3


def qkv(
    heads: int = 4, shared: int = 2, rows: int = 3, columns: int = 5, dtype: mx.Dtype = mx.float32
) -> list[mx.array]:
    """Queries, keys and values of different head sizes (8 for the first two, 6 for values)."""
    return [
        random(2, heads, rows, 8, seed=0, dtype=dtype),
        random(2, shared, columns, 8, seed=1, dtype=dtype),
        random(2, shared, columns, 6, seed=2, dtype=dtype),
    ]


def attend(*arrays: mx.array, mask: Any = None, **named: Any) -> mx.array:
    q, k, v = arrays
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, mask=mask, **named)


def boolean(*shape: int) -> mx.array:
    """A mask under which each row sees its first column at least."""
    mask = np.random.default_rng(0).random(shape) < 0.6
    mask[..., 0] = True
    return mx.array(mask)


def fits(mask: mx.array) -> mx.array:
    return mx.broadcast_to(mask, (2, 4, 3, 5))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cases_1_and_2_without_a_mask(dtype: mx.Dtype, heads: tuple[int, int]) -> None:
    arrays = qkv(*heads, dtype=dtype)
    expected = raising.attention(*arrays, SCALE)  # type: ignore[arg-type]
    check(lambda q, k, v: attend(q, k, v), *arrays, becomes=[ATTENTION], like=expected)


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cases_1_and_2_causal(dtype: mx.Dtype, heads: tuple[int, int], rows: int) -> None:
    arrays = qkv(*heads, rows=rows, dtype=dtype)
    expected = raising.attention(*arrays, SCALE, "causal")  # type: ignore[arg-type]
    fn = lambda q, k, v: attend(q, k, v, mask="causal")  # noqa: E731
    after = check(fn, *arrays, becomes=[ATTENTION], like=expected)
    assert after.nodes[-1].args["mask"] == "causal"


SHAPES = [(3, 5), (1, 5), (1, 3, 5), (4, 3, 5), (2, 1, 1, 5), (1, 4, 3, 5), (2, 4, 3, 5), (5,)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_cases_1_and_2_masks(kind: str, heads: tuple[int, int], shape: tuple[int, ...]) -> None:
    arrays = qkv(*heads)
    mask = boolean(*shape) if kind == "boolean" else random(*shape, seed=4)
    expected = raising.attention(*arrays, SCALE, fits(mask))  # type: ignore[arg-type]
    fn = lambda q, k, v, m: attend(q, k, v, mask=m)  # noqa: E731
    after = check(fn, *arrays, mask, becomes=[ATTENTION], like=expected)
    assert after.nodes[-1].operand("mask") is after.inputs[3]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("mask", [None, "causal", "boolean", "additive"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_case_3_sinks(heads: tuple[int, int], mask: str | None, dtype: mx.Dtype) -> None:
    arrays, sinks = qkv(*heads, dtype=dtype), random(4, seed=5, dtype=dtype)
    masks = {"boolean": boolean(3, 5), "additive": random(3, 5, seed=4, dtype=dtype)}
    given = [masks[mask]] if mask in masks else []
    expected = raising.attention(
        *arrays, SCALE, fits(given[0]) if given else mask, sinks  # type: ignore[arg-type]
    )  # fmt: skip

    def fn(q: Any, k: Any, v: Any, s: Any, m: Any = mask) -> mx.array:
        return attend(q, k, v, mask=m, sinks=s)

    check(fn, *arrays, sinks, *given, becomes=[ATTENTION], like=expected)


def test_text() -> None:
    arrays = [mx.ones((1, 4, 3, 8)), mx.ones((1, 2, 3, 8)), mx.ones((1, 2, 3, 8))]
    fn = lambda q, k, v: attend(q, k, v, mask="causal")  # noqa: E731
    graph = qg.from_mlx(fn, *arrays, name="f")
    head = "graph f(q: f32[1,4,3,8], k: f32[1,2,3,8], v: f32[1,2,3,8]) -> f32[1,4,3,8]\n"
    assert text(graph) == head + (
        "  %0: i32[3] = arange() {dtype=i32, start=0, step=1, stop=3}\n"
        "  %1: i32[3,1] = expand_dims(%0) {axis=(1,)}\n"
        "  %2: i32[3,3] = broadcast_to(%1) {shape=(3, 3)}\n"
        "  %3: i32[1,3] = expand_dims(%0) {axis=(0,)}\n"
        "  %4: i32[3,3] = broadcast_to(%3) {shape=(3, 3)}\n"
        "  %5: bool[3,3] = greater_equal(%2, %4)\n"
        "  %6: bool[1,2,2,3,3] = broadcast_to(%5) {shape=(1, 2, 2, 3, 3)}\n"
        "  %7: f32[1,4,3,8] = broadcast_to(0.3) {shape=(1, 4, 3, 8)}\n"
        "  %8: f32[1,4,3,8] = multiply(%7, q)\n"
        "  %9: f32[1,2,2,3,8] = reshape(%8) {shape=(1, 2, 2, 3, 8)}\n"
        "  %10: f32[1,2,1,3,8] = expand_dims(k) {axis=(2,)}\n"
        "  %11: f32[1,2,1,8,3] = transpose(%10) {axes=(0, 1, 2, 4, 3)}\n"
        "  %12: f32[1,2,2,8,3] = broadcast_to(%11) {shape=(1, 2, 2, 8, 3)}\n"
        "  %13: f32[1,2,2,3,3] = matmul(%9, %12)\n"
        "  %14: f32[1,2,2,3,3] = broadcast_to(-3.4028235e+38) {shape=(1, 2, 2, 3, 3)}\n"
        "  %15: f32[1,2,2,3,3] = where(%6, %13, %14)\n"
        "  %16: f32[1,2,2,3,3] = softmax(%15) {axis=-1, precise=True}\n"
        "  %17: f32[1,2,1,3,8] = expand_dims(v) {axis=(2,)}\n"
        "  %18: f32[1,2,2,3,8] = broadcast_to(%17) {shape=(1, 2, 2, 3, 8)}\n"
        "  %19: f32[1,2,2,3,8] = matmul(%16, %18)\n"
        "  %20: f32[1,4,3,8] = reshape(%19) {shape=(1, 4, 3, 8)}\n"
        "  return %20"
    )
    assert text(raised(graph)) == head + (
        "  %0: f32[1,4,3,8] = fast.scaled_dot_product_attention(q, k, v) {mask=causal, scale=0.3}\n"
        "  return %0"
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_scale_is_the_one_written_where_half_precision_rounded_it(dtype: mx.Dtype) -> None:
    q, k, v = qkv(dtype=dtype)
    fn = lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=8**-0.5)  # noqa: E731
    after = raised(qg.from_mlx(fn, q, k, v))
    assert ops(after) == [ATTENTION]
    assert after.nodes[-1].args["scale"] == pytest.approx(8**-0.5, rel=1e-7)


def test_keys_that_a_model_transposed_itself() -> None:
    def fn(x: mx.array) -> mx.array:
        q, k, v = (x[..., i].transpose(0, 2, 1, 3) for i in range(3))
        return attend(q, k, v).transpose(0, 2, 1, 3)

    x = random(2, 3, 4, 8, 3)
    after = check(fn, x, becomes=["getitem", "squeeze", "transpose"] * 3 + [ATTENTION, "transpose"])
    assert after.outputs[0].node.inputs[0].node.op == ATTENTION


def test_one_tensor_for_keys_and_values() -> None:
    q, k, _ = qkv()
    check(lambda q, k: attend(q, k, k), q, k, becomes=[ATTENTION])


def by_hand(change: Callable[[mx.array], mx.array], precise: bool = True) -> Any:
    def fn(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        scores = (mx.array(SCALE, q.dtype) * q) @ k.swapaxes(-1, -2)
        return mx.softmax(change(scores), axis=-1, precise=precise) @ v

    return fn


def test_near_miss_1() -> None:
    arrays = qkv(4, 4)
    left_alone(by_hand(lambda s: 50.0 * mx.tanh(s / 50.0)), *arrays)
    left_alone(by_hand(lambda s: s * 0.5), *arrays)
    left_alone(by_hand(mx.abs), *arrays)
    left_alone(by_hand(lambda s: mx.where(s > 0, s, mx.array(-1e9))), *arrays)
    left_alone(by_hand(lambda s: s, precise=False), *arrays)
    left_alone(lambda q, k, v: mx.softmax(q @ k.swapaxes(-1, -2), precise=True) @ v, *arrays)


def test_a_formula_that_is_mlx_s_own_is_raised() -> None:
    check(by_hand(lambda s: s), *qkv(4, 4), becomes=[ATTENTION])


def test_near_miss_1_a_mask_of_another_kind() -> None:
    def sliding(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        places = mx.arange(5)
        near = (places[:, None] >= places) & (places[:, None] < places + 2)
        return attend(q, k, v, mask=near)

    after = raised(qg.from_mlx(sliding, *qkv(4, 2, rows=5)))
    assert after.nodes[-1].op == ATTENTION
    assert after.nodes[-1].operand("mask").node.op == "bitwise_and"


@pytest.mark.parametrize("parts", [1, 3])
def test_near_miss_1_scores_joined_from_another_number_of_parts(parts: int) -> None:
    def joined(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        scores = [(q * 0.5) @ k.swapaxes(-1, -2) for _ in range(parts)]
        weights = mx.softmax(mx.concatenate(scores, axis=-1), axis=-1, precise=True)
        return weights[..., : v.shape[2]] @ v

    left_alone(joined, *(random(1, 2, 3, 8, seed=i) for i in range(3)))


def test_near_miss_1_heads_without_elements() -> None:
    empty, v = mx.zeros((1, 2, 3, 0)), random(1, 2, 3, 8)
    left_alone(by_hand(lambda scores: scores), empty, empty, v)


def test_near_miss_2_weights_that_something_else_reads() -> None:
    def fn(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        weights = mx.softmax((mx.array(SCALE) * q) @ k.swapaxes(-1, -2), precise=True)
        return weights @ v, weights

    graph = qg.from_mlx(fn, *qkv(4, 4))
    assert ATTENTION not in ops(raised(graph))


def test_no_row_may_see_anything() -> None:
    """A row under a mask that hides all: MLX's expansion gives the mean, on CPUs raised too."""
    arrays, mask = qkv(), mx.zeros((3, 5), mx.bool_)
    check(lambda q, k, v, m: attend(q, k, v, mask=m), *arrays, mask, becomes=[ATTENTION])
