"""Experts in regions on CUDA: the source, run by a CPU, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.kernels.choice.tuner import Choice
from qgraph.kernels.matmul.tiled.experts import TiledGather
from qgraph.kernels.matmul.tiled.product import Tiled
from qgraph.kernels.matmul.tiled.untiled import Untiled, UntiledGather
from tests.kernels.grid_experts import Case, least_of_negative, softmax_last
from tests.kernels.grid_on_cpu import OnCpu
from tests.kernels.test_grid_regions import ORDERS, error, given, planned, regions
from tests.support.faults import planted


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Tiled, "run", lambda self, *given: Untiled().run(*given))
    monkeypatch.setattr(TiledGather, "run", lambda self, *given: UntiledGather().run(*given))

    def chosen(problem: Any, **_: Any) -> Choice:
        return Choice(TiledGather.name if problem.experts else Tiled.name, "measured", 1.0)

    monkeypatch.setattr("qgraph.passes.choose_kernel.choose", chosen)
    with mx.stream(mx.cpu):
        yield


CASES = [
    Case(),
    Case(rows=3, route=softmax_last, biases=True),
    Case(mx.float16, bits=8, group=32, rows=2, route=least_of_negative),
    Case(bits=3, group=128, inner=128, experts=8, count=2),
    Case(mx.float16, bits=5, experts=72, count=8, inner=128),
    Case(bits=6, group=32, hidden=96, count=1),
    Case(mx.float16, bits=2, hidden=192, biases=True),
    Case(mode="mxfp4", group=32, route=softmax_last, biases=True),
    Case(mx.float16, mode="nvfp4", group=16, rows=2),
    Case(mode="mxfp8", bits=8, group=32, hidden=160),
    Case(common=True),
    Case(mx.float16, bits=8, group=32, rows=3, common=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case: Case, tmp_path: Path) -> None:
    """The whole layer is one region, in any order of blocks and copies."""
    fn, x, wanted = case.build()
    plan = planned(fn, qg.spec(x.shape, x.dtype))
    (region,) = regions(plan.graph)
    assert not any(n.op in ("softmax", "packed_gather") for n in plan.graph.nodes)
    arrays = given(plan.graph, region, [x])
    native = OnCpu(region.bodies[0], tmp_path, 3)
    for order in ORDERS:
        results = native(arrays, **order)
        assert results is not None
        assert native.left == []
        assert error(results[0], wanted) < (0.02 if case.dtype == mx.bfloat16 else 0.003)


def test_a_router_s_columns_may_be_some_of_many() -> None:
    """With gate and up of the expert of all rows they are one product."""
    fn, x, _ = Case(rows=3, common=True, hidden=1024, inner=768, experts=64, count=8).build()
    (region,) = regions(planned(fn, qg.spec(x.shape, x.dtype)).graph)
    widths = [n.output.shape[-1] for n in region.bodies[0].nodes if n.op == "packed_matmul"]
    assert 64 + 2 * 768 + 1 in widths


FAULTS = {
    "a router that nobody waits for": ("}\n__syncthreads();\nring.fill(", "}\nring.fill("),
    "weights of another expert": ("return chosen[pair(time, part)];", "return chosen[time];"),
    "a row of another pair": ("pair(time, part) / EXPERTS;", "0;"),
    "one expert twice": ("taken |= 1u", "taken |= 0u"),
    "pieces that nobody has fetched": ("))) return false; ring.begun()", "))) {} ring.begun()"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str, tmp_path: Path) -> None:
    """Whatever a router's memory holds, some expert is read."""
    case = CASES[1]
    fn, x, wanted = case.build()
    plan = planned(fn, qg.spec(x.shape, x.dtype))
    (region,) = regions(plan.graph)
    arrays = given(plan.graph, region, [x])
    within = planted("which.matrix(own", f"{case.experts - 1} & which.matrix(own")

    def change(text: str) -> str:
        return planted(*FAULTS[fault])(within(text))

    native = OnCpu(region.bodies[0], tmp_path, 3, change)
    found = [native(arrays, **order) for order in ORDERS]
    assert not all(
        r is not None and native.left == [] and error(r[0], wanted) < 0.02 for r in found
    )


def told(plan: qg.Plan) -> list[str]:
    return [str(e) for step in plan.steps for e in step.entries if step.name == "form-grid-regions"]


def test_more_rows_than_are_read_by_themselves() -> None:
    """Near miss 7: products before are a region without them, and what follows another."""
    fn, x, _ = Case(rows=7, count=5).build()
    plan = planned(fn, qg.spec(x.shape, x.dtype))
    assert all(
        "packed_gather" not in [n.op for n in r.bodies[0].nodes] for r in regions(plan.graph)
    )
    assert regions(plan.graph)
    assert any("there is no phase for softmax" in text for text in told(plan))


def test_experts_from_elsewhere() -> None:
    """Near miss 7: whoever chose them, no router of the region did."""
    mx.random.seed(1)
    first = mx.quantize(mx.random.normal((128, 128)).astype(mx.bfloat16))
    experts = mx.quantize(mx.random.normal((4, 128, 128)).astype(mx.bfloat16))

    def fn(x: Any, chosen: Any) -> Any:
        x = qg.sigmoid(x + qg.quantized_matmul(x, *first))
        y = qg.gather_qmm(qg.expand_dims(x, (-2, -3)), *experts, rhs_indices=chosen)
        return qg.sum(y.squeeze(-2), axis=-2)

    plan = planned(fn, qg.spec((1, 1, 128), mx.bfloat16), qg.spec((1, 1, 2), mx.uint32))
    assert len(regions(plan.graph)) == 1
    assert "packed_gather" in [n.op for n in plan.graph.nodes]
    assert any("experts that no router of the region has chosen" in text for text in told(plan))


def test_in_a_loop() -> None:
    fn, x, _ = Case().build()
    graph = planned(lambda x: qg.fori_loop(0, 3, lambda i, h: fn(h), x), x).graph
    (region,) = regions(graph)
    assert "packed_gather" in [n.op for n in region.bodies[0].nodes]
