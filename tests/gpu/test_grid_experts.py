"""Experts in regions on a GPU: a layer in one launch, against float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.ir.loops import REGION
from qgraph.target import as_target
from tests.kernels.grid_experts import Case, least_of_negative, softmax_last
from tests.support.arrays import to_numpy
from tests.support.reference import relative_error

GPU = mx.Device(mx.gpu, 0)
pytestmark = pytest.mark.skipif(
    not mx.is_available(GPU) or "sm_9" not in as_target(GPU).arch, reason="needs a Hopper GPU"
)

LARGE: dict[str, Any] = {"hidden": 1024, "inner": 768, "experts": 64, "count": 8}
CASES = [
    Case(**LARGE),
    Case(rows=3, route=softmax_last, biases=True, **LARGE),
    Case(mx.float16, bits=8, group=32, rows=2, route=least_of_negative, **LARGE),
    Case(bits=3, group=128, hidden=2048, inner=1024, experts=8, count=2),
    Case(mx.float16, bits=5, **LARGE),
    Case(bits=6, group=32, **LARGE),
    Case(mx.float16, bits=2, **LARGE),
    Case(mode="mxfp4", group=32, hidden=1088, inner=960, experts=32, count=4,
         route=softmax_last, biases=True),
    Case(mx.float16, mode="nvfp4", group=16, rows=2, **LARGE),
    Case(mode="mxfp8", bits=8, group=32, **LARGE),
    Case(common=True, **LARGE),
    Case(mx.float16, rows=3, common=True, **LARGE),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case: Case) -> None:
    """Ten times the same, all of it in one region."""
    fn, x, wanted = case.build()
    program = qg.compile(fn, x, target="gpu")
    (region,) = (node for _, node in program.plan.graph.walk() if node.op == REGION)
    assert sum(node.op == "packed_gather" for node in region.bodies[0].nodes) == 2
    made = [program(x) for _ in range(10)]
    assert relative_error(to_numpy(made[0]), wanted) < (0.01 if x.dtype == mx.bfloat16 else 0.002)
    assert all(mx.array_equal(made[0], other).item() for other in made[1:])
