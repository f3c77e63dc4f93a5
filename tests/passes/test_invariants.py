"""What loops carry and hand on, and what branches are given, does not change: it is hoisted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.analysis.changes import fixed_values
from qgraph.analysis.verify import verify
from qgraph.ir.loops import unchanging
from qgraph.passes import EliminateDeadCode, HoistQuantize
from qgraph.passes.shared.invariants import as_invariants
from tests.support.fusion import not_compiled, random

W, X = random(64, 64) / 8, random(2, 64, seed=1)


def step(h: Any, w: Any) -> Any:
    return qg.tanh(qg.quantized_matmul(h, w))


def _nested(x: Any, w: Any) -> Any:
    def inner(j: Any, carry: Any) -> Any:
        return step(*carry), carry[1]

    return qg.fori_loop(0, 2, lambda i, c: qg.fori_loop(0, 2, inner, c), (x, w))[0]


LOOPS: dict[str, Callable[[Any, Any], Any]] = {
    "fori_loop": lambda x, w: qg.fori_loop(0, 3, lambda i, c: (step(*c), c[1]), (x, w)),
    "scan": lambda x, w: qg.scan(lambda c, _: ((step(*c), c[1]), c[0] * c[1][0]), (x, w), length=3),
    "while_loop": lambda x, w: qg.while_loop(
        lambda c: (c[2] < 3) & (qg.sum(c[1]) < 1e9),
        lambda c: (step(c[0], c[1]), c[1], c[2] + 1),
        (x, w, mx.array(0)),
    )[:2],
    "cond": lambda x, w: qg.cond(
        qg.sum(x) > -1e9, lambda x, w: step(x, w), lambda x, w: x + w[0], x, w
    ),
    "nested": _nested,
    "nothing changes": lambda x, w: qg.fori_loop(0, 3, lambda i, c: c, (step(x, w), w)),
}


@pytest.mark.parametrize("parameters", [[], [1]])
@pytest.mark.parametrize("name", LOOPS)
def test_unchanging_operands(name: str, parameters: list[int]) -> None:
    graph = qg.trace(LOOPS[name], X, W, parameters=parameters)
    after = as_invariants(graph, "")
    assert after is not graph
    verify(after)
    for _, node in after.walk():
        assert not unchanging(node)
    assert as_invariants(after, "") is after
    plan = qg.optimize(graph, passes=[HoistQuantize(), EliminateDeadCode()], target="cpu")
    stages = [n.stage for n in plan.graph.nodes if n.op == "quantize"]
    if parameters:
        assert stages == ["prepare"]
    else:  # a branch that is not taken need not quantize
        assert stages == ([] if name == "cond" else ["run"])
    results = []
    with not_compiled():
        for each in (graph, after, plan.graph):
            called = qg.compile(each, passes=[], target="cpu")(X, W)
            results.append(qg.tree.flatten(called)[0])
    for first, *others in zip(*results, strict=True):
        assert all(mx.array_equal(first, other) for other in others)


def test_text() -> None:
    def turn(i: Any, carry: Any) -> Any:
        h, w = carry
        return h @ w, w

    loop = qg.trace(lambda x, w: qg.fori_loop(0, 4, turn, (x, w)), X, W, name="f")
    assert as_invariants(loop, "").format(origins=False) == (
        "graph f(x: f32[2,64], w: f32[64,64]) -> (f32[2,64], f32[64,64])\n"
        "  %carry.0: f32[2,64] = fori_loop[4](x; w)\n"
        "    body(i: i32[], carry.0: f32[2,64]; w)\n"
        "      %0: f32[2,64] = matmul(carry.0, w)\n"
        "      yield %0\n"
        "  return %carry.0, w"
    )


def test_what_changes_stays_carried() -> None:
    def swap(i: Any, carry: Any) -> Any:
        return carry[0] @ carry[1], carry[2], carry[1]

    graph = qg.trace(lambda x, a, b: qg.fori_loop(0, 4, swap, (x, a, b)), X, W, W + 1)
    assert as_invariants(graph, "") is graph


def test_what_is_fixed_is_what_may_be_packed() -> None:
    """A kernel's layout of a weight that is not computed once would be made at every call."""
    key = mx.random.key(0)
    for make, fixed in (
        (lambda w: w * 2, True),
        (qg.keep, False),
        (lambda w: qg.keep(w) * 2, False),
        (lambda w: w + qg.random.normal((64, 64), key=qg.tensor(key)), False),
        (lambda w: qg.fori_loop(0, 2, lambda i, h: h * 2, w), False),
    ):
        graph = qg.trace(lambda w, make=make: make(w), W, parameters=[0])
        assert (graph.outputs[0] in fixed_values(graph)) is fixed
