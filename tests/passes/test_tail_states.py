"""`tail-states`: programs take tails beside the caches that they are given."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.passes import TailStates
from tests.passes.test_fuse_cache import DIM, LENGTH, PASSES, in_float64, operands, step
from tests.passes.test_tail_caches import ROPE, ops

ROWS = 4
STATES = ((1, 1), (2, 2))


def plan(fn: Any, states: Any = STATES, rows: int = ROWS, *more: Any) -> qg.Plan:
    graph = qg.trace(fn, *operands(), mx.array(5), *more, name="f")
    return qg.optimize(graph, passes=[*PASSES, TailStates(states, rows)], target="cpu")


HEADS = (
    "heads=((4, 0, 512), (2, 256, 512), (2, 384, 512)), rope=(64, False, 10000.0, 1.0), scale=0.125"
)


def test_text() -> None:
    before, after = (
        plan(step(), states).graph.format(origins=False).splitlines() for states in ((), STATES)
    )
    assert before == [
        "graph f(x: f32[1,1,512], keys: f32[1,2,12,64], values: f32[1,2,12,64], position: i32[]) "
        "-> (f32[1,1,256], f32[1,2,12,64], f32[1,2,12,64])",
        "  %0: i32[1] = reshape(position) {shape=(1,)}",
        "  %1: f32[1,4,1,64], %2: f32[1,2,12,64], %3: f32[1,2,12,64] = "
        f"cached_attention(x, x, x, keys, values, %0, position) {{{HEADS}}}",
        "  %4: f32[1,1,256] = reshape(%1) {shape=(1, 1, 256)}",
        "  return %4, %2, %3",
    ]
    assert after == [
        "graph f(x: f32[1,1,512], keys: f32[1,2,12,64], values: f32[1,2,12,64], position: i32[], "
        "tail.keys: f32[1,2,4,64], tail.values: f32[1,2,4,64], tail.0: i32[4]) -> "
        "(f32[1,1,256], f32[1,2,12,64], f32[1,2,12,64], f32[1,2,4,64], f32[1,2,4,64], i32[4])",
        "  %0: i32[1] = reshape(position) {shape=(1,)}",
        "  %1: f32[1,4,1,64], %2: f32[1,2,4,64], %3: f32[1,2,4,64], %4: i32[4] = "
        "tail_attention(x, x, x, keys, values, tail.keys, tail.values, tail.0, %0, position) "
        f"{{{HEADS}}}",
        "  %5: f32[1,2,12,64] = merge_tail(keys, %2, %4)",
        "  %6: f32[1,2,12,64] = merge_tail(values, %3, %4)",
        "  %7: f32[1,1,256] = reshape(%1) {shape=(1, 1, 256)}",
        "  return %7, %5, %6, %2, %3, %4",
    ]


def test_numbers() -> None:
    """From token to token the caches stay, tails go on; the graph's own results are as before."""
    program = qg.compile(plan(step()).graph, passes=[], target="cpu")
    x, keys, values = operands()
    tails = [mx.zeros((1, 2, ROWS, DIM))] * 2 + [mx.full((ROWS,), -1, mx.int32)]
    after = [np.array(a, np.float64) for a in (keys, values)]
    for n, at in enumerate((3, 4, 3, LENGTH - 1)):  # one position comes again
        token = mx.random.normal(x.shape, key=mx.random.key(10 + n))
        y, new_keys, new_values, *tails = program(token, keys, values, mx.array(at), *tails)
        want, *after = in_float64([token, *(mx.array(a, mx.float32) for a in after)], at, **ROPE)
        np.testing.assert_allclose(y, want, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(new_keys, after[0], rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(new_values, after[1], rtol=2e-4, atol=2e-5)
    assert tails[2].tolist() == [3, 4, 3, LENGTH - 1]


def two(x: Any, keys: Any, values: Any, position: Any, keys2: Any, values2: Any, other: Any) -> Any:
    """Two layers, the second of which stores at a position of its own."""
    y, keys, values = step()(x, keys, values, position)
    z, keys2, values2 = step()(qg.concatenate([y, y], axis=-1), keys2, values2, other)
    return z, keys, values, keys2, values2


def test_each_position_has_positions_of_its_own() -> None:
    more = *operands()[1:], mx.array(7)
    states = (*STATES, (4, 3), (5, 4))
    graph = plan(two, states, ROWS, *more).graph
    names = [v.node.args["name"] for v in graph.inputs[7:]]
    assert names == ["tail.keys", "tail.values", "tail.keys2", "tail.values2", "tail.0", "tail.1"]
    alike = plan(lambda *given: two(*given[:-1], given[3]), states, ROWS, *more).graph
    assert [v.type.shape for v in alike.inputs[7:]] == [(1, 2, ROWS, DIM)] * 4 + [(ROWS,)]


def in_a_loop(x: Any, keys: Any, values: Any, position: Any) -> Any:
    def turn(_: Any, carry: Any) -> Any:
        y, keys, values = step()(*carry, position)
        return qg.concatenate([y, y], axis=-1), keys, values

    return qg.fori_loop(0, 2, turn, (x, keys, values))


LEFT: dict[str, tuple[Any, Any, int]] = {
    "no states": (step(), (), ROWS),
    "no rows": (step(), STATES, 0),
    "caches that a loop carries": (in_a_loop, STATES, ROWS),
    "an output that is another state's": (step(), ((1, 2), (2, 1)), ROWS),
    "what is read before": (step(), ((1, 1),), ROWS),
    "what is read after": (
        lambda x, k, v, p: (lambda y, a, b: (y, a, b, a))(*step()(x, k, v, p)), STATES, ROWS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    fn, states, rows = LEFT[name]
    made = plan(fn, states, rows)
    assert made.steps[-1].name == "tail-states"
    assert not made.steps[-1].changed
    assert "tail_attention" not in ops(made.graph)


@pytest.mark.parametrize(
    ("states", "said"),
    [(STATES, "a tail of 4 rows beside its cache"), (((1, 1),), "something else reads it")],
)
def test_the_ledger_says_it(states: Any, said: str) -> None:
    (entry,) = [e for e in plan(step(), states).ledger() if e.made_by == "tail-states"]
    assert said in entry.reason
