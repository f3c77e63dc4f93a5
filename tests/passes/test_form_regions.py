"""Which nodes become regions, and what else reads graphs that hold some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.analysis.verify import verify
from qgraph.errors import VerifyError
from qgraph.ir import Graph
from qgraph.ir.loops import REGION
from qgraph.kernels.cpu.region import RegionError
from qgraph.passes import FormRegions
from qgraph.rewrite.regions import inlined
from qgraph.runtime.regions.cpu.known import refusal
from qgraph.target import Target, as_target
from qgraph.tracing.tensor import apply
from tests.support.compiler import needs_compiler

pytestmark = needs_compiler
CPU = as_target("cpu")
W = mx.random.normal((64, 64), key=mx.random.key(1))
W8 = W[:8, :8]
EVERYWHERE = [FormRegions(CPU, everywhere=True)]


def formed(function: Any, *specs: Any) -> qg.Plan:
    graph = qg.trace(function, *specs, name="f")
    return qg.optimize(graph, target="cpu", passes=EVERYWHERE)


def text(plan: qg.Plan) -> str:
    return plan.graph.format(origins=False)


def mixed(x: Any) -> Any:
    h = qg.quantized_matmul(x, W) * 2
    return qg.linalg.inv(h @ h.T), qg.exp(x)


def test_what_waits_for_nothing_unknown_is_one_region() -> None:
    plan = formed(mixed, qg.spec((4, 64)))
    assert (
        text(plan)
        == """\
graph f(x: f32[4,64]) -> (f32[4,4], f32[4,64])
  pack (once):
    w_q: u32[64,8], w_s: f32[64,1], w_b: f32[64,1] = quantize(@W) {bits=4, group_size=64}
  %0: f32[4,4], %1: f32[4,64] = region(x, w_q, w_s, w_b)
    %2: f32[4,64] = quantized_matmul(x, w_q, w_s, w_b) {bits=4, group_size=64}
    %3: f32[4,64] = multiply(%2, 2)
    %4: f32[64,4] = transpose(%3)
    %5: f32[4,4] = matmul(%3, %4)
    %6: f32[4,64] = exp(x)
    yield %5, %6
  %7: f32[4,4] = linalg.inv(%0)
  return %7, %1""".replace("w_", "W_")
    )
    (entry,) = [e for e in plan.ledger() if e.made_by == "form-regions"]
    assert entry.reason == "it ends before linalg.inv: there is no kind of work for linalg.inv"


def test_a_loop_that_is_known_is_inside_and_one_that_is_not_holds_regions() -> None:
    def loops(x: Any) -> Any:
        x = qg.fori_loop(0, 3, lambda i, h: qg.tanh(h) + i, x)
        return qg.fori_loop(0, 3, lambda i, h: qg.linalg.inv(qg.exp(h)) * 0.5, x)

    assert (
        text(formed(loops, qg.spec((4, 4))))
        == """\
graph f(x: f32[4,4]) -> f32[4,4]
  %0: f32[4,4] = region(x)
    %h: f32[4,4] = fori_loop[3](x)
      body(i: i32[], h: f32[4,4])
        %1: f32[4,4] = tanh(h)
        %2: f32[4,4] = add(%1, i)
        yield %2
    yield %h
  %h_2: f32[4,4] = fori_loop[3](%0)
    body(i_2: i32[], h_2: f32[4,4])
      %3: f32[4,4] = region(h_2)
        %4: f32[4,4] = exp(h_2)
        yield %4
      %5: f32[4,4] = linalg.inv(%3)
      %6: f32[4,4] = region(%5)
        %7: f32[4,4] = multiply(%5, 0.5)
        yield %7
      yield %6
  return %h_2"""
    )


def test_a_quantize_leaves_a_loop_before_the_loop_enters_a_region() -> None:
    plan = formed(
        lambda x: qg.fori_loop(0, 3, lambda i, h: qg.quantized_matmul(h, W), x), qg.spec((1, 64))
    )
    stages = {n.op: n.stage for _, n in plan.graph.walk()}
    assert (stages["quantize"], stages["quantized_matmul"]) == ("pack", "run")
    assert [n.op for n in plan.graph.nodes if n.stage == "run" and n.op != "constant"] == ["region"]


def test_near_misses() -> None:
    graph = qg.trace(lambda x: qg.exp(x) + 1, qg.spec((4,)))
    assert FormRegions(CPU)(graph) is graph  # a call costs more than it gives
    metal = Target(mx.Device(mx.cpu, 0), "metal", "m", 8)
    assert FormRegions(metal, everywhere=True)(graph) is graph
    own = qg.trace(lambda x: qg.exp(x, stream="cpu"), qg.spec((4,)))
    assert FormRegions(CPU, everywhere=True)(own) is own
    wide = qg.trace(lambda x: qg.exp(x), qg.spec((4,), mx.complex64))
    assert FormRegions(CPU, everywhere=True)(wide) is wide


def test_a_rank_s_part_is_in_no_region() -> None:
    """Which part a rank takes is known when it runs; a region's body is settled before."""

    def fn(x: Any) -> Any:
        part = apply("distributed.part", (qg.exp(x), 0, 2, 3))
        return qg.tanh(qg.fori_loop(0, 3, lambda _, y: qg.exp(y) * 0.1, part)) + 1

    after = FormRegions(CPU, everywhere=True)(qg.trace(fn, qg.spec((5, 400))))
    assert [n.op for n in after.nodes if n.op != "constant"] == [REGION, "distributed.part", REGION]


def test_no_engine_no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qgraph.passes.stored_scales.why_no_engine", lambda: "no compiler")
    graph = qg.trace(lambda x: qg.exp(x) @ W, qg.spec((64, 64)))
    assert FormRegions(CPU, everywhere=True)(graph) is graph


def test_without_an_engine_the_body_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = formed(mixed, qg.spec((4, 64))).graph
    x = mx.random.normal((4, 64), key=mx.random.key(2))
    wanted = qg.compile(graph, target="cpu", passes=[])(x)
    monkeypatch.setattr("qgraph.runtime.regions.run.missing", lambda: "no compiler")
    program = qg.compile(graph, target="cpu", passes=[])
    for a, b in zip(program(x), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert str(program.plan.ledger()[-1]).endswith("it runs by its body: no compiler")
    assert "it runs by its body: no compiler" in program.plan.report()


def test_regions_dissolve() -> None:
    plan = formed(mixed, qg.spec((4, 64)))
    graph = inlined(plan.graph)
    verify(graph)
    ops = [n.op for n in graph.nodes if n.op != "constant"]
    assert ops == ["quantize", "quantized_matmul", "multiply", "transpose", "matmul", "exp",
                   "linalg.inv"]  # fmt: skip


def test_every_reader_of_graphs_knows_regions(tmp_path: Path) -> None:
    plan = formed(mixed, qg.spec((4, 64)))
    assert str(Graph.from_json(plan.graph.to_json())) == str(plan.graph)
    plan.check(mx.random.normal((4, 64)))
    assert "from the graph to the body of %0" in str(plan.diff("form-regions"))
    plan.dump(tmp_path / "dump")
    plan.save(tmp_path / "plan.me.json")
    assert "region" in plan.timeline()
    assert "cluster" in plan.graph.to_dot()


def test_verify_names_what_a_region_breaks() -> None:
    plan = formed(lambda x: qg.exp(x) + 1, qg.spec((4,)))
    (region,) = [n for n in plan.graph.nodes if n.op == "region"]
    body = region.bodies[0]
    wrong = region.replace(bodies=[body.replace(outputs=[*body.outputs, *body.outputs])])
    with pytest.raises(VerifyError, match="region"):
        verify(plan.graph.replace(nodes=[wrong], outputs=wrong.outputs))


def test_a_file_of_mlx_s_own_holds_the_body(tmp_path: Path) -> None:
    product = lambda x: qg.exp(qg.quantized_matmul(x, W) * 0.1) + 1  # noqa: E731
    program = qg.compile(product, qg.spec((4, 64)), target="cpu", passes=EVERYWHERE)
    x = mx.random.normal((4, 64), key=mx.random.key(2))
    (y,) = mx.import_function(str(program.export(tmp_path / "f.mlxfn")))(x)
    np.testing.assert_allclose(y, program(x), rtol=1e-5)


def test_a_saved_program_runs_natively_again(tmp_path: Path) -> None:
    program = qg.compile(mixed, qg.spec((4, 64)), target="cpu", passes=EVERYWHERE)
    x = mx.random.normal((4, 64), key=mx.random.key(2))
    loaded = qg.load(program.save(tmp_path / "f"))
    for a, b in zip(loaded(x), program(x), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_profile_shows_phases() -> None:
    def step(x: Any) -> Any:
        return qg.fori_loop(0, 4, lambda i, h: qg.softmax(h @ W), x)

    program = qg.compile(step, qg.spec((4, 64)), target="cpu", passes=EVERYWHERE)
    measured = program.profile(mx.ones((4, 64)), repeats=2)
    assert {"matmul", "softmax"} <= set(measured.by_phase())
    (row,) = [row for row in measured.rows if row.node.op == "matmul"]
    assert row.times == 4
    assert row.seconds > 0
    assert "phases of regions" in str(measured)
    assert any(", largest cut " in s.label for s in measured.stretches)


def test_a_profile_counts_what_copies_move() -> None:
    def step(x: Any) -> Any:
        return qg.fori_loop(0, 3, lambda i, h: qg.softmax(h.T.reshape(4, 8) @ W8), x)

    program = qg.compile(step, qg.spec((4, 8)), target="cpu", passes=EVERYWHERE)
    phases = program.profile(mx.ones((4, 8)), repeats=1).by_phase()
    copies = [p for what in phases if "reshape" in what for p in phases[what]]
    assert [p.nbytes for p in copies] == [3 * 2 * 4 * 8 * 4]  # each turn reads and writes h
    assert all(p.nbytes for found in phases.values() for p in found)


def test_a_region_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    program = qg.compile(lambda x: qg.exp(x) @ W, qg.spec((4, 64)), target="cpu", passes=EVERYWHERE)
    (step,) = program.executables[0].lowered.steps

    def fails(*_: Any) -> Any:
        raise RegionError("there is too little memory for a run of the region")

    monkeypatch.setattr(step.native, "take", fails)
    with pytest.raises(qg.QGraphError, match="too little memory") as caught:
        program(mx.ones((4, 64)))
    assert "test_form_regions.py" in str(caught.value)


@pytest.mark.parametrize("name", ["allclose", "array_equal"])
def test_a_reduction_without_an_axis_reduces_all(name: str) -> None:
    x = mx.ones((4, 4))
    program = qg.compile(lambda x: getattr(qg, name)(qg.exp(x), qg.exp(x)), x, target="cpu")
    assert program(x).item()


def test_what_the_engine_said_of_a_node_holds_for_its_like_alone() -> None:
    def said(fn: Any, *specs: Any) -> list[str | None]:
        return [refusal(node) for node in qg.trace(fn, *specs).nodes if node.op != "constant"]

    x, i, twice = qg.spec((4, 4)), qg.spec((4, 4), mx.int32), 2
    for _ in range(twice):
        assert said(lambda x, i: qg.take_along_axis(x, i, 1), x, i) == [None]
        every = said(lambda x, i: qg.take_along_axis(x, i, None), x, qg.spec((16,), mx.int32))
        assert every == ["take_along_axis of all axes"]
        assert said(lambda x, y: x + y, x, x) == [None]
        assert said(lambda x: x + x, x) == [None]
        assert said(lambda x, y: x + y, x, qg.spec((4, 4), mx.complex64)) == ["values of complex64"]
        assert said(lambda x: x[::2], x) == said(lambda x: x[:, ::2], x) == [None]
        assert said(lambda x: qg.full((4,), x), qg.spec(())) == ["full of an array"]
