"""Estimated schedules: streams, hand-overs, the critical path, and how they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.analysis.schedule import HAND_OVER, Durations, busiest, critical_path, loads, schedule
from qgraph.inspection.timeline import timelines
from qgraph.ir import Graph, Node, Value
from qgraph.passes import ChooseKernel
from qgraph.rewrite.rewriter import rewrite_each
from qgraph.target import Target
from tests.support.compiler import needs_compiler
from tests.support.passes import passes_without

CPU = Target(mx.Device(mx.cpu, 0), "cpu", "x86_64", 2)
GPU = Target(mx.Device(mx.cpu, 0), "cuda", "sm_90", 2)
MS = 1e-3


def on_streams(graph: Graph, streams: dict[str, int]) -> Graph:
    """The graph with ops put on streams by name."""

    def visit(node: Node) -> Sequence[Value] | None:
        return node.replace(stream=streams[node.op]).outputs if node.op in streams else None

    return rewrite_each(graph, visit, "")


def given(target: Target, graph: Graph, **seconds: float) -> Durations:
    return Durations(target, {n: (seconds[n.op], 1) for n in graph.nodes if n.op in seconds})


def diamond() -> Graph:
    """sin, then exp and cos beside one another, then add."""

    def fn(x: Any) -> Any:
        h = qg.sin(x)
        return qg.exp(h) + qg.cos(h.reshape(2, 2)).reshape(4)

    return on_streams(qg.trace(fn, qg.spec((4,)), name="f"), {"cos": 1})


@pytest.mark.parametrize(("target", "wait"), [(CPU, HAND_OVER), (GPU, 0.0)])
def test_streams_run_side_by_side_after_a_hand_over(target: Target, wait: float) -> None:
    graph = diamond()
    durations = given(target, graph, sin=1 * MS, exp=5 * MS, cos=3 * MS, add=1 * MS)
    start = {bar.node.op: bar.start for bar in schedule(graph, durations)}
    assert start["sin"] == 0
    assert start["exp"] == pytest.approx(1 * MS)
    assert start["cos"] == pytest.approx(1 * MS + wait)
    assert start["add"] == pytest.approx(6 * MS)
    assert [(load.stream, load.nodes) for load in loads(schedule(graph, durations))] == [
        ("0", 3),
        ("1", 1),
    ]


def test_a_late_result_of_another_stream_is_waited_for() -> None:
    graph = diamond()
    durations = given(CPU, graph, sin=1 * MS, exp=1 * MS, cos=3 * MS, add=1 * MS)
    start = {bar.node.op: bar.start for bar in schedule(graph, durations)}
    assert start["add"] == pytest.approx(4 * MS + 2 * HAND_OVER)


def test_the_critical_path() -> None:
    graph = diamond()
    nodes, seconds = critical_path(
        graph, given(CPU, graph, sin=1 * MS, exp=5 * MS, cos=3 * MS, add=1 * MS)
    )
    assert [n.op for n in nodes] == ["sin", "exp", "add"]
    assert seconds == pytest.approx(7 * MS)


def test_loops_are_followed_inwards_while_they_take_most_of_the_time() -> None:
    def fn(x: Any) -> Any:
        inner = lambda i, h: qg.tanh(h @ h)  # noqa: E731
        return qg.fori_loop(0, 9, lambda i, h: qg.fori_loop(0, 9, inner, h), x) + 1

    graph = qg.trace(fn, qg.spec((256, 256)), name="f")
    found = busiest(graph, Durations(CPU))
    assert [[n.op for n in g.nodes if n.op != "constant"] for g in found] == [
        ["fori_loop", "add"],
        ["fori_loop"],
        ["matmul", "tanh"],
    ]
    flat = qg.trace(lambda x: qg.fori_loop(0, 1, lambda i, h: h + 1, x) @ x, qg.spec((256, 256)))
    assert len(busiest(flat, Durations(CPU))) == 1


@pytest.mark.parametrize("turns", [0, 1, 5])
def test_loops_take_as_long_as_their_turns(turns: int) -> None:
    graph = qg.trace(
        lambda x: qg.fori_loop(0, turns, lambda i, h: qg.tanh(h), x) + 1, qg.spec((4,)), name="f"
    )
    loop, add = (n for n in graph.nodes if n.op in ("fori_loop", "add"))
    (tanh,) = (n for n in loop.bodies[0].nodes if n.op == "tanh")
    durations = Durations(CPU, {tanh: (1 * MS, 1), add: (1 * MS, 1)})
    assert durations.of(loop) == pytest.approx(turns * MS)
    assert schedule(graph, durations)[-1].start == pytest.approx(turns * MS)
    assert timelines(graph, CPU).startswith("f: one call")


def test_the_drawing() -> None:
    w = mx.quantize(mx.random.normal((2048, 2048)))
    plan = qg.optimize(
        qg.trace(lambda x: qg.tanh(qg.quantized_matmul(x, *w)), qg.spec((1, 2048)), name="f"),
        target=CPU,
        passes=passes_without("choose-kernel", "form-regions"),
    )
    first, one, two, path = plan.timeline(72).splitlines()
    assert first.startswith("f: one call, estimated ")
    assert one.startswith("  stream 0  [quantized_matmul")
    assert two.startswith("  stream 1  [quantized_matmul")
    assert path.startswith("critical path")
    assert all(len(line) <= 72 for line in (one, two))
    assert "critical path" in plan.report()
    assert timelines(qg.trace(lambda x: x, qg.spec((1,)), name="g"), CPU).startswith("g: one call")


@needs_compiler
def test_products_from_the_host_have_a_line_of_their_own() -> None:
    w = mx.quantize(mx.random.normal((2048, 2048)))
    graph = qg.trace(lambda x: qg.tanh(qg.quantized_matmul(x, *w)), qg.spec((1, 2048)), name="f")
    made = qg.optimize(graph, target=CPU, passes=[ChooseKernel(CPU)]).graph
    product, tanh = schedule(made, Durations(CPU))
    assert (product.stream, tanh.stream) == ("host", "0")
    assert tanh.start == pytest.approx(product.seconds + HAND_OVER)
    _, stream, host, _ = timelines(made, CPU, 72).splitlines()
    assert stream.startswith("  stream 0  ")
    assert host.startswith("  host      [simd")


def test_long_paths_are_summed_up() -> None:
    def fn(x: Any) -> Any:
        for _ in range(9):
            x = qg.tanh(x)
        return x

    path = timelines(qg.trace(fn, qg.spec((4,)), name="f"), CPU).splitlines()[-1]
    assert path == "critical path 9 µs: 9 nodes; 9 × tanh 9 µs"
