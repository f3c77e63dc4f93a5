"""Sums over two GPUs with what follows them: texts before and after, near misses, numbers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.analysis.meshes import for_rank
from qgraph.ir.graph import Graph
from qgraph.ir.loops import REGION
from qgraph.passes import FuseSums
from qgraph.rewrite.ledger import collecting
from qgraph.runtime.regions.cuda.peers import Peers
from qgraph.runtime.regions.cuda.pushed import PushedRegion
from qgraph.target import Target
from tests.support import mesh_zoo, reference
from tests.support.arrays import to_numpy
from tests.support.fusion import random

WEIGHT = random(64, seed=1)
W = random(64, 64, seed=2)


def target(ranks: int = 2, rank: int | None = 0, backend: str = "cuda") -> Target:
    mesh = qg.Mesh(ranks, rank=rank, backend="nccl")
    return Target(mx.Device(mx.cpu, 0), backend, "sm_90", 4, mesh)


def total(x: Any) -> Any:
    return qg.distributed.all_sum(x @ W)


def normed(h: Any, weight: Any = WEIGHT) -> Any:
    return qg.fast.rms_norm(h, weight, 1e-5)


def layers(x: Any, h: Any) -> Any:
    """Two sums: what was added in the first is read again, in the second it is not."""
    h = h + total(x)
    y = normed(h)
    return normed(total(y) + h)


def fused(fn: Any, *given: Any, to: Target | None = None) -> tuple[Graph, Graph]:
    before = qg.trace(fn, *(given or SPECS), name="f")
    after = FuseSums(to or target())(before)
    qg.optimize(after, passes=[], target="cpu")  # verifies it
    return before, after


SPECS = (qg.spec((300, 64)), qg.spec((300, 64)))


def text(graph: Graph) -> str:
    return graph.format(origins=False)


def test_a_sum_its_residual_and_its_norm_are_one_launch() -> None:
    """1."""
    with collecting() as entries:
        before, after = fused(layers)
    assert text(before) == (
        "graph f(x: f32[300,64], h: f32[300,64]) -> f32[300,64]\n"
        "  %0: f32[300,64] = matmul(x, @W)\n"
        "  %1: f32[300,64] = distributed.all_sum(%0)\n"
        "  %2: f32[300,64] = add(h, %1)\n"
        "  %3: f32[300,64] = fast.rms_norm(%2, @weight) {eps=1e-05}\n"
        "  %4: f32[300,64] = matmul(%3, @W)\n"
        "  %5: f32[300,64] = distributed.all_sum(%4)\n"
        "  %6: f32[300,64] = add(%5, %2)\n"
        "  %7: f32[300,64] = fast.rms_norm(%6, @weight) {eps=1e-05}\n"
        "  return %7"
    )
    assert text(after) == (
        "graph f(x: f32[300,64], h: f32[300,64]) -> f32[300,64]\n"
        "  %0: f32[300,64] = matmul(x, @W)\n"
        "  %1: f32[300,64], %2: f32[300,64] = region(%0, h, @weight)  kernel=grid\n"
        "    %3: f32[300,64] = distributed.all_sum(%0)\n"
        "    %4: f32[300,64] = add(h, %3)\n"
        "    %5: f32[300,64] = fast.rms_norm(%4, @weight) {eps=1e-05}\n"
        "    yield %4, %5\n"
        "  %6: f32[300,64] = matmul(%2, @W)\n"
        "  %7: f32[300,64] = region(%6, %1, @weight)                  kernel=grid\n"
        "    %8: f32[300,64] = distributed.all_sum(%6)\n"
        "    %9: f32[300,64] = add(%8, %1)\n"
        "    %10: f32[300,64] = fast.rms_norm(%9, @weight) {eps=1e-05}\n"
        "    yield %10\n"
        "  return %7"
    )
    assert {entry.decision for entry in entries} == {"fused"}


def test_its_body_gives_the_same() -> None:
    """On one rank, whose sums are its own."""
    before, after = fused(layers)
    xs = random(300, 64, seed=4), random(300, 64, seed=5)
    for one, other in zip(mesh_zoo.run(before, *xs), mesh_zoo.run(after, *xs), strict=True):
        assert reference.relative_error(to_numpy(other), to_numpy(one)) < 1e-6


def test_two_sums_that_meet() -> None:
    """One of them is pushed."""
    _, after = fused(lambda x, h: normed(total(x) + total(h)))
    (region,) = (node for node in after.nodes if node.op == REGION)
    assert [n.op for n in region.bodies[0].nodes] == ["distributed.all_sum", "add", "fast.rms_norm"]
    assert sum(node.op == "distributed.all_sum" for node in after.nodes) == 1


def test_in_a_loop() -> None:
    _, after = fused(lambda x, h: qg.fori_loop(0, 3, lambda _, y: layers(y, h), x))
    (loop,) = (node for node in after.nodes if node.op == "fori_loop")
    assert [node.op for node in loop.bodies[0].nodes].count(REGION) == 2


def test_it_is_launched_where_memory_is_shared() -> None:
    _, after = fused(layers)
    for node in for_rank(after, 0).nodes:
        if node.op == REGION:
            (body,) = node.bodies
            assert PushedRegion.of(body, Peers(2, mx.zeros(3, mx.uint64))) is not None
            assert PushedRegion.of(body, None) is None


NEAR_MISSES = {
    "the sum is read again": lambda x, h: (s := total(x)) + normed(h + s),
    "the sum is a result": lambda x, h: (s := total(x), normed(h + s)),
    "a residual of one row": lambda x, h: normed(h[:1] + total(x)),
    "nothing is added": lambda x, _: normed(total(x)),
    "it is added to itself": lambda x, _: normed((s := total(x)) + s),
    "two norms": lambda x, h: normed(s := h + total(x)) + normed(s, WEIGHT + 1),
    "no weight": lambda x, h: normed(h + total(x), None),
    "a weight of another type": lambda x, h: normed(h + total(x), WEIGHT.astype(mx.float16)),
    "another norm": lambda x, h: qg.fast.layer_norm(h + total(x), WEIGHT, None, 1e-5),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses(case: str) -> None:
    """Leaves alone 2."""
    before, after = fused(NEAR_MISSES[case])
    assert after is before


def test_sizes() -> None:
    """Leaves alone 3: rows for which a block has no threads, no whole 16 bytes, too much."""

    def fn(x: Any, h: Any, weight: Any) -> Any:
        return normed(h + qg.distributed.all_sum(x), weight)

    for rows, width, is_fused in ((2, 8192, 1), (2, 8196, 0), (2, 62, 0), (1 << 17, 128, 0)):
        given = [qg.spec((rows, width))] * 2 + [qg.spec((width,))]
        before, after = fused(fn, *given)
        assert (after is not before) == is_fused


@pytest.mark.parametrize("to", [target(3), target(rank=None), target(backend="cpu")])
def test_other_meshes(to: Target) -> None:
    """Leaves alone 4."""
    before, after = fused(layers, to=to)
    assert after is before
