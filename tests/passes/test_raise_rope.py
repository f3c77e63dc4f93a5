"""`raise-rope`: every numbered case of the pass, and what it must leave alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import qgraph as qg
from tests.support import raising
from tests.support.raising import DTYPES, by_base, check, left_alone, ops, raised, random, text

ROPE = "fast.rope"
SETTINGS: dict[str, Any] = {"traditional": False, "base": 10000.0, "scale": 1.0, "offset": 0}


def rotate(x: mx.array, dims: int, **changes: Any) -> mx.array:
    return mx.fast.rope(x, dims, **{**SETTINGS, **changes})


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 4, 3, 8), (2, 2, 2, 3, 8), (1, 1, 1, 8)])
@pytest.mark.parametrize("dims", [8, 4, 2])
@pytest.mark.parametrize("traditional", [False, True])
def test_case_1_halves_and_neighbours(traditional: bool, dims: int, shape: tuple[int, ...]) -> None:
    x = random(*shape)
    check(
        lambda x: rotate(x, dims, traditional=traditional, scale=0.5, offset=7),
        x,
        becomes=[ROPE],
        like=raising.rope(x, dims, traditional, by_base(10000.0, dims), 0.5, 7),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_case_1_dtypes(dtype: mx.Dtype) -> None:
    x = random(2, 4, 3, 8, dtype=dtype)
    expected = raising.rope(x, 8, False, by_base(10000.0, 8), 1.0, 0)
    after = check(lambda x: rotate(x, 8), x, becomes=[ROPE], like=expected)
    assert after.outputs[0].dtype == dtype


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint32, mx.int64, mx.int16])
@pytest.mark.parametrize("form", ["scalar", "one", "each"])
@pytest.mark.parametrize("axes", [3, 4])
def test_case_1_offsets_in_tensors(axes: int, form: str, dtype: mx.Dtype) -> None:
    x = random(*(2, 4, 3, 8)[4 - axes :])
    offset = {"scalar": mx.array(5), "one": mx.array([5]), "each": mx.arange(x.shape[0])}[form]
    offset = offset.astype(dtype)
    graph = qg.from_mlx(lambda x, o: rotate(x, 8, offset=o), x, offset)
    after = raised(graph)
    assert set(ops(after)) <= {ROPE, "astype"}
    result = qg.compile(after, passes=[], target="cpu")(x, offset)
    assert mx.array_equal(result, rotate(x, 8, offset=offset))
    expected = raising.rope(x, 8, False, by_base(10000.0, 8), 1.0, np.array(offset))
    assert np.allclose(np.array(result), expected, atol=1e-5)


@pytest.mark.parametrize("base", [10000.0, 500000.0, 1e6, 10007.0, 2.0, 1234567.0, 5e-1, 3.3333])
@pytest.mark.parametrize("dims", [8, 6, 128])
def test_case_2_bases(dims: int, base: float) -> None:
    x = random(1, 2, 3, 128)
    graph = raised(qg.from_mlx(lambda x: rotate(x, dims, base=base), x))
    assert ops(graph) == [ROPE]
    found = graph.nodes[-1].args["base"]
    assert found == pytest.approx(base, rel=2e-6)
    if base in (10000.0, 500000.0, 1e6):
        assert found == base
    result = qg.compile(graph, passes=[], target="cpu")(x)
    assert mx.array_equal(result, rotate(x, dims, base=base))


@pytest.mark.parametrize("traditional", [False, True])
def test_case_2_frequencies_in_a_tensor(traditional: bool) -> None:
    x, freqs = random(2, 4, 3, 8), mx.array([1.0, 3.0, 10.0])
    check(
        lambda x, f: rotate(x, 6, base=None, freqs=f, traditional=traditional, offset=2),
        x, freqs,
        becomes=[ROPE],
        like=raising.rope(x, 6, traditional, raising.wide(freqs), 1.0, 2),
    )  # fmt: skip


def test_text() -> None:
    graph = qg.from_mlx(lambda x: rotate(x, 4, offset=3), mx.ones((1, 2, 5, 4)), name="f")
    assert len(ops(graph)) == 27
    assert text(graph).splitlines()[-8:] == [
        "  %20: f32[1,2,5,2] = broadcast_to(%19) {shape=(1, 2, 5, 2)}",
        "  %21: f32[1,2,5,2] = multiply(%18, %20)",
        "  %22: f32[1,2,5,2] = subtract(%17, %21)",
        "  %23: f32[1,2,5,2] = multiply(%0, %20)",
        "  %24: f32[1,2,5,2] = multiply(%18, %16)",
        "  %25: f32[1,2,5,2] = add(%23, %24)",
        "  %26: f32[1,2,5,4] = concatenate([%22, %25]) {axis=3}",
        "  return %26",
    ]
    assert text(raised(graph)) == (
        "graph f(x: f32[1,2,5,4]) -> f32[1,2,5,4]\n"
        "  %0: f32[1,2,5,4] = fast.rope(x) {base=10000.0, dims=4, offset=3, scale=1.0, "
        "traditional=False}\n"
        "  return %0"
    )


def test_text_with_tensors() -> None:
    graph = qg.from_mlx(
        lambda x, o, f: rotate(x, 4, base=None, offset=o, freqs=f, traditional=True),
        mx.ones((1, 2, 5, 6)), mx.array(3), mx.ones(2), name="f",
    )  # fmt: skip
    assert text(raised(graph)) == (
        "graph f(x: f32[1,2,5,6], o: i32[], f: f32[2]) -> f32[1,2,5,6]\n"
        "  %0: f32[1,2,5,6] = fast.rope(x, offset=o, freqs=f) {dims=4, scale=1.0, "
        "traditional=True}\n"
        "  return %0"
    )


def test_queries_and_keys_share_their_tables() -> None:
    def fn(q: mx.array, k: mx.array, offset: mx.array) -> mx.array:
        return rotate(q, 8, offset=offset) @ rotate(k, 8, offset=offset).swapaxes(-1, -2)

    check(fn, random(1, 2, 3, 8), random(1, 2, 3, 8, seed=1), mx.array(4),
          becomes=[ROPE, ROPE, "transpose", "matmul"])  # fmt: skip


def test_the_module_of_mlx() -> None:
    layer = nn.RoPE(8, traditional=True, base=500000.0, scale=0.25)
    check(lambda x: layer(x, offset=9), random(2, 4, 3, 8), becomes=[ROPE])


def test_near_miss_1_tables_of_a_model_s_own() -> None:
    x = random(1, 2, 3, 8)

    def cosines(x: mx.array, power: float = -0.5, factor: float = 1.0, swap: bool = False) -> Any:
        angle = mx.arange(3, dtype=mx.float32)[:, None] * mx.exp(mx.arange(4) * power)
        c, s = factor * mx.cos(angle), mx.sin(angle)
        one, two = x[..., :4], x[..., 4:]
        turned = one * c - two * s, one * s + two * c
        return mx.concatenate(turned[::-1] if swap else turned, axis=-1)

    left_alone(cosines, x)
    left_alone(lambda x: cosines(x, power=-0.3), x)
    left_alone(lambda x: cosines(x, factor=1.1), x)
    left_alone(lambda x: cosines(x, swap=True), x)


@pytest.mark.parametrize(("power", "half"), [(50.0, 32), (-50.0, 32), (0.1, 0)])
def test_near_miss_1_frequencies_that_no_base_gives(power: float, half: int) -> None:
    def rotated(x: mx.array, offset: mx.array) -> mx.array:
        frequencies = mx.exp(mx.arange(0, -half, -1, mx.float32) * mx.array(power))
        positions = (mx.arange(3, dtype=mx.float32) + offset.astype(mx.float32)) * mx.array(1.0)
        angle = positions[:, None] * frequencies
        c, s = mx.cos(angle), mx.sin(angle)
        one, two = x[..., :half], x[..., half:]
        return mx.concatenate([one * c - two * s, one * s + two * c], axis=-1)

    left_alone(rotated, random(1, 2, 3, 2 * half), mx.array([5]))


def test_near_miss_1_a_factor_beside_it_stays() -> None:
    check(lambda x: 1.5 * rotate(x, 8), random(1, 2, 3, 8),
          becomes=["broadcast_to", ROPE, "multiply"])  # fmt: skip


def test_near_miss_2_the_backward_rotation() -> None:
    x, g = random(1, 2, 3, 8), random(1, 2, 3, 8, seed=1)

    def backward(x: mx.array, g: mx.array) -> mx.array:
        return mx.vjp(lambda x: rotate(x, 8), [x], [g])[1][0]

    assert ROPE not in ops(raised(qg.from_mlx(backward, x, g)))


def test_in_a_loop_with_the_turn_as_offset() -> None:
    def fn(x: Any) -> Any:
        turn = lambda i, h: qg.call(lambda h, i: rotate(h, 8, offset=i), h, i)  # noqa: E731
        return qg.fori_loop(0, 3, turn, x)

    x = random(1, 2, 3, 8)
    after = raised(qg.trace(fn, x))
    assert ops(after) == ["fori_loop", ROPE]
    expected = x
    for i in range(3):
        expected = rotate(expected, 8, offset=i)
    program = qg.compile(after, passes=[], target="cpu")
    assert mx.allclose(program(x), expected, rtol=1e-6, atol=1e-6)
