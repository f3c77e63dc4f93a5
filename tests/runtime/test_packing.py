"""The pack step of programs with several specialisations: what they share, and what they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.ir import Node
from qgraph.runtime.interpret import Interpreter

SIZE = 512
W = mx.random.normal((SIZE, SIZE), key=mx.random.key(0))
LIMIT = mx.full((SIZE,), 0.1)
BACKWARDS = mx.arange(SIZE - 1, -1, -1)

Change = Callable[[Any, Any], Any]
PAIRS: dict[str, tuple[Change, Change]] = {
    "an array for one parameter or the other": (
        lambda of, w: of.clip(w, LIMIT, None), lambda of, w: of.clip(w, None, LIMIT),
    ),
    "an array among the static parts of an index": (
        lambda of, w: w[BACKWARDS, :], lambda of, w: w[:, BACKWARDS],
    ),
    "settings": (lambda of, w: of.roll(w, 1, 0), lambda of, w: of.roll(w, 1, 1)),
    "numbers": (lambda of, w: w * 2.0, lambda of, w: w * 3.0),
    "the order of operands": (lambda of, w: w - LIMIT, lambda of, w: LIMIT - w),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_what_differs_is_packed_apart(pair: str) -> None:
    one, many = PAIRS[pair]

    def fn(x: Any) -> Any:
        change = one if x.shape[0] == 1 else many
        return qg.quantized_matmul(x, change(qg, qg.tensor(W)))

    program = qg.jit(fn, target="cpu")
    for rows, change in ((1, one), (2, many)):
        x = mx.random.normal((rows, SIZE), key=mx.random.key(rows))
        expected = mx.quantized_matmul(x, *mx.quantize(change(mx, W)))
        np.testing.assert_allclose(program(x), expected, rtol=1e-4, atol=2e-4)
    packed = sum(part.nbytes for part in mx.quantize(W))
    assert program.weight_bytes == 2 * packed


def test_a_value_read_twice_again_and_again() -> None:
    """Its key would grow to 2^60 parts, were it written out."""

    def fn(x: Any) -> Any:
        w = qg.tensor(W)
        for _ in range(60):
            w = w - w * LIMIT
        return qg.quantized_matmul(x, w)

    program = qg.jit(fn, target="cpu")
    results = [program(mx.ones((rows, SIZE))) for rows in (1, 2)]
    assert mx.allclose(results[1][1], results[0][0], rtol=1e-4, atol=1e-6)
    assert program.weight_bytes == sum(part.nbytes for part in mx.quantize(W))


def test_the_same_number_in_two_traces_is_the_same() -> None:
    program = qg.jit(lambda x: qg.quantized_matmul(x, qg.tensor(W) * 0.5 + 1), target="cpu")
    for rows in (1, 2):
        program(mx.ones((rows, SIZE)))
    assert program.weight_bytes == sum(part.nbytes for part in mx.quantize(W))


@pytest.mark.parametrize(
    ("index", "held"), [(mx.array([1, 2]), 2), (slice(1, 3), SIZE), ((slice(1, 3), None), SIZE)]
)
def test_rows_that_are_sliced_off_hold_the_whole_and_picked_ones_do_not(
    index: Any, held: int
) -> None:
    program = qg.jit(lambda x: x + qg.sin(qg.tensor(W))[index], target="cpu")
    x = mx.ones((1, SIZE))
    assert mx.allclose(program(x), x + mx.sin(W)[index], atol=1e-6)
    assert program.weight_bytes == 4 * held * SIZE
    kept = [array.size for arrays in program.cache._arrays.values() for array in arrays]
    assert max(kept) == held * SIZE


def test_what_leads_to_a_packed_weight_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    class Noting(Interpreter):
        def run(self, node: Node, env: Any) -> None:
            ran.append(node.op)
            super().run(node, env)

    monkeypatch.setattr("qgraph.runtime.packing.Interpreter", Noting)
    program = qg.jit(lambda x: qg.quantized_matmul(x, qg.sin(qg.tensor(W))), target="cpu")
    results = [program(mx.ones((rows, SIZE))) for rows in (1, 2)]
    assert ran[:2] == ["sin", "quantize"]
    assert not {"sin", "quantize"} & {*ran[2:]}  # shards, where they are the choice
    assert mx.allclose(results[1][1], results[0][0], rtol=1e-4, atol=1e-4)


def _shares_a_number(x: Any) -> Any:
    return qg.fori_loop(0, 3, lambda i, h: h * 2 + qg.quantized_matmul(h, qg.tensor(W) * 2), x)


def _in_a_branch(x: Any) -> Any:
    def true(h: Any) -> Any:
        return h * 3 + qg.quantized_matmul(h, qg.tensor(W) * 3)

    return qg.cond(qg.sum(x) > 0, true, lambda h: h * 3, x)


def _in_nested_loops(x: Any) -> Any:
    def turn(i: Any, h: Any) -> Any:
        inner = qg.fori_loop(0, 2, lambda j, g: g * 0.5 + qg.quantized_matmul(g, _half()), h)
        return inner * 0.5

    return qg.fori_loop(0, 2, turn, x)


def _half() -> Any:
    return qg.tensor(W) * 0.5


def _in_a_scan(x: Any) -> Any:
    def turn(h: Any, s: Any) -> Any:
        return h * 2 + qg.quantized_matmul(h, qg.tensor(W) * 2) + s, h * 2

    return qg.scan(turn, x, mx.ones((3, 1, SIZE)))


@pytest.mark.parametrize("fn", [_shares_a_number, _in_a_branch, _in_nested_loops, _in_a_scan])
def test_packing_lets_go_of_nothing_that_a_body_reads(fn: Any) -> None:
    """A copy that was lifted out of a loop is packed; what it was copied of stays in the body."""
    x = mx.random.normal((1, SIZE), key=mx.random.key(7)) / 100
    as_written = qg.compile(qg.trace(fn, x), passes=[], target="cpu")
    expected = qg.tree.flatten(as_written(x))[0]
    for release in (None, False):
        actual = qg.tree.flatten(qg.compile(fn, x, target="cpu", release=release)(x))[0]
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-3, atol=1e-3)
