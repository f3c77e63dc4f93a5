"""Residuals with their norms: texts before and after, near misses, numbers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.ir.graph import Graph
from qgraph.ir.loops import REGION
from qgraph.passes import FuseResiduals, HoistQuantize
from qgraph.rewrite.ledger import collecting
from qgraph.runtime.regions.cuda.residual import ResidualRegion
from qgraph.target import Target
from tests.support.arrays import to_numpy
from tests.support.fusion import random
from tests.support.reference import relative_error

WEIGHT = random(64, seed=1)
W = random(64, 64, seed=2)
SPECS = (qg.spec((300, 64)), qg.spec((300, 64)))


def target(backend: str = "cuda") -> Target:
    return Target(mx.Device(mx.cpu, 0), backend, "sm_90", 4)


def normed(h: Any, weight: Any = WEIGHT) -> Any:
    return qg.fast.rms_norm(h, weight, 1e-5)


def layers(x: Any, h: Any) -> Any:
    """Two residuals: the first is read again, the second is not."""
    h = h + x @ W
    return normed(normed(h) @ W + h)


def fused(fn: Any, *given: Any, to: Target | None = None) -> tuple[Graph, Graph]:
    before = qg.trace(fn, *(given or SPECS), name="f")
    after = FuseResiduals(to or target())(before)
    qg.optimize(after, passes=[], target="cpu")  # verifies it
    return before, after


def text(graph: Graph) -> str:
    return graph.format(origins=False)


def test_a_residual_and_its_norm_are_one_launch() -> None:
    """1."""
    with collecting() as entries:
        before, after = fused(layers)
    assert text(before) == (
        "graph f(x: f32[300,64], h: f32[300,64]) -> f32[300,64]\n"
        "  %0: f32[300,64] = matmul(x, @W)\n"
        "  %1: f32[300,64] = add(h, %0)\n"
        "  %2: f32[300,64] = fast.rms_norm(%1, @weight) {eps=1e-05}\n"
        "  %3: f32[300,64] = matmul(%2, @W)\n"
        "  %4: f32[300,64] = add(%3, %1)\n"
        "  %5: f32[300,64] = fast.rms_norm(%4, @weight) {eps=1e-05}\n"
        "  return %5"
    )
    assert text(after) == (
        "graph f(x: f32[300,64], h: f32[300,64]) -> f32[300,64]\n"
        "  %0: f32[300,64] = matmul(x, @W)\n"
        "  %1: f32[300,64], %2: f32[300,64] = region(h, %0, @weight)  kernel=grid\n"
        "    %3: f32[300,64] = add(h, %0)\n"
        "    %4: f32[300,64] = fast.rms_norm(%3, @weight) {eps=1e-05}\n"
        "    yield %3, %4\n"
        "  %5: f32[300,64] = matmul(%2, @W)\n"
        "  %6: f32[300,64] = region(%5, %1, @weight)                  kernel=grid\n"
        "    %7: f32[300,64] = add(%5, %1)\n"
        "    %8: f32[300,64] = fast.rms_norm(%7, @weight) {eps=1e-05}\n"
        "    yield %8\n"
        "  return %6"
    )
    assert [entry.decision for entry in entries] == ["fused", "fused"]
    regions = [node.bodies[0] for node in after.nodes if node.op == REGION]
    assert all(ResidualRegion.of(body) is not None for body in regions)


def test_numbers() -> None:
    """Of the bodies, which run where there is no GPU."""
    _, after = fused(layers)
    x, h = random(300, 64, seed=4), random(300, 64, seed=5)

    def by_numpy(h: Any) -> Any:
        return h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-5) * to_numpy(WEIGHT)

    w = to_numpy(W)
    sum = to_numpy(h) + to_numpy(x) @ w
    wanted = by_numpy(by_numpy(sum) @ w + sum)
    made = qg.compile(after, passes=[], target="cpu")(x, h)
    assert relative_error(to_numpy(made), wanted) < 1e-5


def test_in_a_loop() -> None:
    _, after = fused(lambda x, h: qg.fori_loop(0, 3, lambda _, y: layers(y, h), x))
    (loop,) = (node for node in after.nodes if node.op == "fori_loop")
    assert [node.op for node in loop.bodies[0].nodes].count(REGION) == 2


def test_a_weight_that_is_computed_once() -> None:
    """As gemma's 1 + weight is, which stands after the sum and is there before it."""
    plan = qg.optimize(
        qg.trace(lambda x, h: normed(h + x, qg.add(WEIGHT, 1)), *SPECS),
        target=target(),
        passes=[HoistQuantize(), FuseResiduals(target())],
    )
    nodes = [node for node in plan.graph.nodes if node.op != "constant"]
    assert [(node.op, node.stage) for node in nodes] == [("add", "pack"), (REGION, "run")]


def test_a_weight_that_is_computed_later() -> None:
    """5: a region stands where the sum did, and what the norm alone reads may not be there yet."""

    def late(x: Any, h: Any) -> Any:
        s = h + x
        return s @ W + normed(s, qg.exp(h[0]))

    def early(x: Any, h: Any) -> Any:
        weight = qg.exp(h[0])
        return normed(h + x, weight)

    before, after = fused(late)
    assert after is before
    assert any(node.op == REGION for node in fused(early)[1].nodes)


NEAR_MISSES = {
    "nothing is added": lambda x, _: normed(x),
    "a residual of one row": lambda x, h: normed(h[:1] + x),
    "a residual of another type": lambda x, h: normed(h.astype(mx.float16) + x),
    "it is added to itself": lambda x, _: normed(x + x),
    "two norms": lambda x, h: normed(s := h + x) + normed(s, WEIGHT + 1),
    "no weight": lambda x, h: normed(h + x, None),
    "a weight of another type": lambda x, h: normed(h + x, WEIGHT.astype(mx.float16)),
    "another norm": lambda x, h: qg.fast.layer_norm(h + x, WEIGHT, None, 1e-5),
    "another operation": lambda x, h: normed(h - x),
    "no rows": lambda x, h: normed(h[:0] + x[:0]),
    "an eps that is an array": lambda x, h: qg.fast.rms_norm(h + x, WEIGHT, mx.array(1e-5)),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses(case: str) -> None:
    """Leaves alone 2."""
    before, after = fused(NEAR_MISSES[case])
    assert after is before


@pytest.mark.parametrize(
    ("width", "is_fused"), [(4, True), (62, False), (8192, True), (8196, False), (16384, False)]
)
def test_sizes(width: int, is_fused: bool) -> None:
    """Leaves alone 3."""
    given = [qg.spec((2, width))] * 2 + [qg.spec((width,))]
    before, after = fused(lambda x, h, weight: normed(h + x, weight), *given)
    assert (after is not before) == is_fused


def test_streams_and_targets() -> None:
    """Leaves alone 4; what is packed has none of what runs, and is no launch."""
    given = random(4, 64, seed=7), random(4, 64, seed=8)
    packed = qg.trace(lambda x: x @ normed(mx.array(given[0]) + given[1] * 1.0).T, SPECS[0])
    packed = HoistQuantize()(packed)
    assert FuseResiduals(target())(packed) is packed
    before, after = fused(lambda x, h: normed(qg.add(h, x, stream=mx.cpu)))
    assert after is before
    for backend in ("cpu", "metal"):
        before, after = fused(layers, to=target(backend))
        assert after is before
