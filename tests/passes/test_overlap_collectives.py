"""Rows in halves: texts before and after, near misses, and numbers as on one device."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.analysis.meshes import in_one_process
from qgraph.ir.graph import Graph
from qgraph.mesh import LINKS, Link
from qgraph.passes import MergeMatmuls, OverlapCollectives, Shard
from qgraph.rewrite.ledger import collecting
from qgraph.target import Target
from tests.support import mesh_zoo, reference
from tests.support.arrays import to_numpy
from tests.support.fusion import random

ROWS, HIDDEN = 512, 256


@pytest.fixture(autouse=True)
def slow_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over which few rows take long."""
    monkeypatch.setitem(LINKS, "nccl", Link(2e-6, 1e9))


def target(ranks: int = 2, backend: str = "cuda", overlap: bool = True) -> Target:
    mesh = qg.Mesh(ranks, backend="nccl", overlap=overlap) if ranks else None
    return Target(mx.Device(mx.cpu, 0), backend, "sm_90", 4, mesh)


def spread(fn: Any, *given: mx.array, to: Target | None = None) -> Graph:
    to = to or target()
    merged: Graph = MergeMatmuls(to)(Shard(to)(qg.trace(fn, *given, name="f")))
    return merged


def overlapped(fn: Any, *given: mx.array, to: Target | None = None) -> tuple[Graph, Graph]:
    """Before and after; verified."""
    before = spread(fn, *given, to=to)
    after = OverlapCollectives(to or target())(before)
    qg.optimize(after, passes=[], target="cpu")
    return before, after


def packed(n: int, k: int, seed: int) -> tuple[mx.array, ...]:
    return tuple(mx.quantize(random(n, k, seed=seed) / k**0.5))


OUT, UP = packed(HIDDEN, 256, 1), packed(512, HIDDEN, 2)
DOWN, Q = packed(HIDDEN, 256, 3), packed(HIDDEN, HIDDEN, 4)
NORM = random(HIDDEN, seed=5)


def normed(h: Any) -> Any:
    return qg.fast.rms_norm(h, NORM, 1e-5)


def layer(x: Any, h: Any) -> Any:
    """What stands between two attentions, and how the second begins."""
    h = h + qg.quantized_matmul(qg.shard(x, -1), *OUT)
    gate, up = qg.split(qg.quantized_matmul(normed(h), *UP), 2, axis=-1)
    h = h + qg.quantized_matmul(qg.sigmoid(gate) * up, *DOWN)
    return qg.softmax(qg.quantized_matmul(normed(h), *Q), axis=-2)


def given(*shape: int) -> list[mx.array]:
    return [random(*shape, 256, seed=20), random(*shape, HIDDEN, seed=21)]


def text(graph: Graph) -> list[str]:
    """The nodes, without lines of this file and parts of weights."""
    nodes = [line for line in str(graph).splitlines() if line.startswith("  %")]
    short = [re.sub(r"(,\s)?@?\w+\.\d\w*|  +.*| \{bits=.*", "", line[2:]) for line in nodes]
    return [line for line in short if "_part" not in line and "distributed.part" not in line]


def test_text_before_and_after() -> None:
    def fn(x: Any, h: Any) -> Any:
        h = h + qg.quantized_matmul(qg.shard(x, -1), *OUT)
        return qg.softmax(qg.quantized_matmul(normed(h), *Q), axis=-2)

    before, after = overlapped(fn, *given(ROWS))
    assert text(before)[:6] == [
        "%4: f32[512,256] = quantized_matmul(%0, %1, %2, %3)",
        "%5: f32[512,256] = distributed.all_sum(%4)",
        "%6: f32[512,256] = add(h, %5)",
        "%7: f32[512,256] = fast.rms_norm(%6, @NORM) {eps=1e-05}",
        "%11: f32[512,128] = quantized_matmul(%7, %8, %9, %10)",
        "%12: f32[512,128] = softmax(%11) {axis=-2}",
    ]
    assert text(after)[:16] == [
        "%7: f32[256,128] = getitem(%0, [0:256])",
        "%8: f32[256,256] = quantized_matmul(%7, %1, %2, %3)",
        "%9: f32[256,128] = getitem(%0, [256:512])",
        "%10: f32[256,256] = quantized_matmul(%9, %1, %2, %3)",
        "%11: f32[256,256] = distributed.all_sum(%8)",
        "%12: f32[256,256] = distributed.all_sum(%10)",
        "%13: f32[256,256] = getitem(h, [0:256])",
        "%14: f32[256,256] = add(%13, %11)",
        "%15: f32[256,256] = getitem(h, [256:512])",
        "%16: f32[256,256] = add(%15, %12)",
        "%17: f32[256,256] = fast.rms_norm(%14, @NORM) {eps=1e-05}",
        "%18: f32[256,256] = fast.rms_norm(%16, @NORM) {eps=1e-05}",
        "%19: f32[256,128] = quantized_matmul(%17, %4, %5, %6)",
        "%20: f32[256,128] = quantized_matmul(%18, %4, %5, %6)",
        "%21: f32[512,128] = concatenate([%19, %20])",
        "%22: f32[512,128] = softmax(%21) {axis=-2}",
    ]


def sums(graph: Graph) -> Counter[tuple[int, ...]]:
    """The shapes that are summed over the ranks."""
    return Counter(n.output.shape for _, n in graph.walk() if n.op == "distributed.all_sum")


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("shape", [(ROWS,), (1, ROWS), (2, ROWS)])
def test_a_layer(shape: tuple[int, ...], ranks: int) -> None:
    """Cases 1 to 3: all that lies between the attentions, with numbers of one device."""
    x = given(*shape)
    to = target(ranks)
    with collecting() as entries:
        before, after = overlapped(layer, *x, to=to)
    half = (*shape[:-1], ROWS // 2, HIDDEN)
    assert sums(before) == {(*shape, HIDDEN): 2}
    assert sums(after) == {half: 4}
    joined = [n.inputs[0].shape for n in after.nodes if n.op == "concatenate"]
    assert [shape[:-1] for shape in joined].count(half[:-1]) == 1
    assert {e.case for e in entries if e.made_by == "overlap-collectives"} == {1}
    with mx.stream(mx.cpu):
        wanted = mesh_zoo.run(qg.trace(layer, *x, name="f"), *x)
        found = mesh_zoo.run(in_one_process(after, ranks), *x)
    assert reference.relative_error(to_numpy(found[0]), to_numpy(wanted[0])) < 1e-5


def test_sums_of_several_products() -> None:
    """What is added up before it is summed goes in halves with all its products."""

    def fn(x: Any, h: Any) -> Any:
        y = qg.quantized_matmul(qg.shard(x, -1), *OUT) + qg.quantized_matmul(qg.shard(h, -1), *DOWN)
        return qg.exp(y)

    _, after = overlapped(fn, *given(ROWS))
    assert sums(after) == {(ROWS // 2, HIDDEN): 2}
    assert [n.op for n in after.nodes].count("quantized_matmul") == 4


def stays(fn: Any, *x: mx.array, to: Target | None = None) -> None:
    before, after = overlapped(fn, *x, to=to)
    assert after is before


def test_few_rows_stay() -> None:
    """Leaves alone 1: of two rows the sum takes as long as its latency."""
    stays(layer, *given(2))


def test_large_results_stay() -> None:
    """Leaves alone 2: to join logits of all rows would take longer than is hidden."""
    wide = packed(1 << 17, HIDDEN, 7)

    def fn(x: Any, h: Any) -> Any:
        h = h + qg.quantized_matmul(qg.shard(x, -1), *OUT)
        return qg.quantized_matmul(normed(h), *wide)

    _, after = overlapped(fn, *given(ROWS))
    products = [n.output.shape for n in after.nodes if n.op == "quantized_matmul"]
    assert products == [(ROWS // 2, HIDDEN)] * 2 + [(ROWS, 1 << 16)]


def test_sums_of_no_product_stay() -> None:
    """Leaves alone 3: partial sums of an input, say."""

    def fn(x: Any, h: Any) -> Any:
        return qg.exp(qg.sum(qg.shard(qg.reshape(x, (256, ROWS, 1)), 0), axis=0)) + h

    before = spread(fn, *given(ROWS))
    assert sums(before) == {(ROWS, 1): 1}
    stays(fn, *given(ROWS))


def test_rows_that_are_needed_together_stay() -> None:
    """Leaves alone 4: odd numbers of rows, and products of which rows are summed."""
    stays(layer, *given(ROWS + 1))


@pytest.mark.parametrize("to", [target(0), target(1), target(2, "cpu"), target(overlap=False)])
def test_other_targets(to: Target) -> None:
    """Leaves alone 5 and 6."""
    graph = qg.trace(layer, *given(ROWS), name="f")
    assert OverlapCollectives(to)(graph) is graph
