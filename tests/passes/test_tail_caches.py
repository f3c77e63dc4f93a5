"""`tail-caches`: a loop carries a tail of its caches; `tests/gpu` has the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.analysis.kernel_settings import wrong_setting
from qgraph.kernels.attention.cached_attention import Heads, Rope
from qgraph.kernels.attention.tail_attention import FAR, merge_tail, tail_attention
from qgraph.passes import TailCaches
from tests.passes.test_fuse_cache import DIM, LENGTH, PASSES, in_float64, operands, step

WITH_TAILS = [*PASSES, TailCaches()]
ROPE = {"dims": DIM, "traditional": False, "base": 1e4, "scale": 1.0}


def decode(turns: Any, extra: Callable[..., Any] = lambda keys, x: x, layers: int = 1) -> Any:
    """A loop over tokens, each made of the one before; `layers` caches of their own."""

    def fn(x: Any, keys: Any, values: Any, position: Any) -> Any:
        def turn(carry: Any, _: Any) -> Any:
            x, caches, position = carry
            after = []
            for keys, values in caches:
                y, *cache = step()(x, keys, values, position)
                x = x + qg.concatenate([y, y], axis=-1)
                after.append(tuple(cache))
            return (extra(keys, x), after, position + 1), y

        start = (x, [(keys, values)] * layers, position)
        if callable(turns):
            return turns(lambda carry: turn(carry, None)[0], start)
        return qg.scan(turn, start, length=turns)

    return fn


def plan(fn: Any) -> qg.Plan:
    graph = qg.trace(fn, *operands(), mx.array(5), name="f")
    return qg.optimize(graph, passes=WITH_TAILS, target="cpu")


def ops(graph: qg.Graph) -> list[str]:
    return [n.op for _, n in graph.walk()]


@pytest.mark.parametrize("position", [0, 3, LENGTH - 4, LENGTH - 1])
def test_numbers(position: int) -> None:
    """Also where the last tokens lie outside the cache and are stored nowhere."""
    made = plan(decode(4))
    assert ops(made.graph).count("tail_attention") == 1
    assert ops(made.graph).count("merge_tail") == 2
    assert "cached_attention" not in ops(made.graph)
    (x_after, [cache], _), ys = qg.compile(made.graph, passes=[], target="cpu")(
        *operands(), mx.array(position)
    )
    x, keys, values = (np.array(a, np.float64) for a in operands())
    for at in range(position, min(position + 4, LENGTH)):
        given = [mx.array(a, mx.float32) for a in (x, keys, values)]
        y, keys, values = in_float64(given, at, **ROPE)
        x = x + np.concatenate([y, y], axis=-1)
        np.testing.assert_allclose(ys[at - position], y, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(cache[0], keys, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(cache[1], values, rtol=2e-4, atol=2e-5)
    if position + 4 <= LENGTH:
        np.testing.assert_allclose(x_after, x, rtol=2e-4, atol=2e-5)


def test_text() -> None:
    assert plan(decode(4)).graph.format(origins=False).splitlines()[1:] == [
        "  %carry.0: f32[1,1,512], %carry.2: i32[], %tail_keys: f32[1,2,4,64], "
        "%tail_values: f32[1,2,4,64], %tail_positions: i32[4], %0: f32[4,1,1,256] = "
        "scan[4](x, position, @c0, @c0, @c1; keys, values)",
        "    body(carry.0: f32[1,1,512], carry.2: i32[], tail_keys: f32[1,2,4,64], "
        "tail_values: f32[1,2,4,64], tail_positions: i32[4]; keys, values)",
        "      %1: i32[1] = reshape(carry.2) {shape=(1,)}",
        "      %2: f32[1,4,1,64], %3: f32[1,2,4,64], %4: f32[1,2,4,64], %5: i32[4] = "
        "tail_attention(carry.0, carry.0, carry.0, keys, values, tail_keys, tail_values, "
        "tail_positions, %1, carry.2) {heads=((4, 0, 512), (2, 256, 512), (2, 384, 512)), "
        "rope=(64, False, 10000.0, 1.0), scale=0.125}",
        "      %6: f32[1,1,256] = reshape(%2) {shape=(1, 1, 256)}",
        "      %7: f32[1,1,512] = concatenate([%6, %6]) {axis=-1}",
        "      %8: f32[1,1,512] = add(carry.0, %7)",
        "      %9: i32[] = add(carry.2, 1)",
        "      yield %8, %9, %3, %4, %5, %6",
        "  %10: f32[1,2,12,64] = merge_tail(values, %tail_values, %tail_positions)",
        "  %11: f32[1,2,12,64] = merge_tail(keys, %tail_keys, %tail_positions)",
        "  return %carry.0, %11, %10, %carry.2, %0",
    ]


def test_several_caches_and_nested_loops() -> None:
    def outer(x: Any, keys: Any, values: Any, position: Any) -> Any:
        def turn(_: Any, carry: Any) -> Any:
            x, keys, values, position = carry
            (x, [(keys, values), _], position), _ = decode(3, layers=2)(x, keys, values, position)
            return x, keys, values, position

        return qg.fori_loop(0, 2, turn, (x, keys, values, position))

    made = plan(outer)
    assert ops(made.graph).count("tail_attention") == 2
    program = qg.compile(made.graph, passes=[], target="cpu")
    given = (*operands(), mx.array(2))
    for got, want in zip(program(*given), outer(*given), strict=True):
        np.testing.assert_allclose(got, want, rtol=3e-4, atol=3e-5)


REFUSED: dict[str, tuple[Any, str]] = {
    "one turn": (decode(1), "it turns 1 times"),
    "more turns than rows": (decode(65), "it turns 65 times"),
    "turns that the run knows": (
        decode(lambda body, start: qg.while_loop(lambda c: c[2] < 9, body, start)), "only the run",
    ),
    "something reads the keys": (
        decode(4, extra=lambda keys, x: x + qg.mean(keys)), "something else reads them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_near_misses(case: str) -> None:
    fn, why = REFUSED[case]
    made = plan(fn)
    assert "tail_attention" not in ops(made.graph)
    assert "cached_attention" in ops(made.graph)
    (entry,) = [e for e in made.ledger() if e.made_by == "tail-caches"]
    assert (entry.decision, why in entry.reason) == ("refused", True)


def test_a_tail_by_hand() -> None:
    """A position that comes again, and one outside the cache."""
    heads = (Heads(2, 0, 256), Heads(1, 128, 256), Heads(1, 192, 256))
    cache = mx.random.normal((1, 1, 6, 64), key=mx.random.key(1))
    tail = (mx.zeros((1, 1, 4, 64)), mx.zeros((1, 1, 4, 64)), mx.full((4,), -1, mx.int32))
    now = np.array(cache)
    for i, position in enumerate((2, 6, 2, 5)):
        x = mx.random.normal((1, 256), key=mx.random.key(10 + i))
        y, *after = tail_attention(
            x, x, x, cache, cache, *tail, mx.array(position), mx.array(4), heads=heads, rope=Rope(),
            scale=0.1,
        )  # fmt: skip
        tail = (after[0], after[1], after[2])
        if position < 6:
            now[0, 0, position] = np.array(x)[0, 192:]
    assert tail[2].tolist() == [2, FAR, 2, 5]
    np.testing.assert_array_equal(merge_tail(cache, tail[1], tail[2]), now)
    assert y.shape == (1, 2, 1, 64)


def test_a_damaged_tail_is_refused() -> None:
    graph = plan(decode(4)).graph
    for _, node in graph.walk():
        if node.op == "tail_attention":
            wrong = node.replace(args={**node.args, "tail_positions": node.operand("last")})
            assert "has a tail of" in (wrong_setting(wrong) or "")
            assert wrong_setting(node) is None
