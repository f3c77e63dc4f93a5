"""`read-packed-rows`: an embedding and a head of one weight keep one copy of it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.kernels.choice.tuner import Choice
from qgraph.passes import (
    ChooseKernel,
    EliminateCommonSubexpressions,
    EliminateDeadCode,
    HoistQuantize,
    ReadPackedRows,
    choose_kernel,
)
from qgraph.target import Target

CPU = Target(mx.Device(mx.cpu, 0), "cpu", "x86_64", 2)
W = mx.random.normal((300, 128), key=mx.random.key(0)).astype(mx.float16)
Q = mx.quantize(W)
IDS = mx.array([[7, -1, 299], [0, 64, 63]])
PASSES: list[Any] = [
    ChooseKernel(CPU, min_flops=0),
    ReadPackedRows(),
    HoistQuantize(),
    EliminateCommonSubexpressions(),
    EliminateDeadCode(),
]


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of `tiled`, by a kernel that runs on CPUs."""
    chosen = Choice("untiled+qmm", "table", 1.0, (("qmm", 1000.0),))
    monkeypatch.setattr(choose_kernel, "choose", lambda *_, **__: chosen)


def tied(q: Any, ids: Any, of: Any = qg) -> Any:
    h = of.dequantize(*(of.take(part, ids, axis=0) for part in q))
    return of.quantized_matmul(h, *q)


def ops(program: qg.Program) -> list[str]:
    return [n.op for n in program.plan.graph.nodes if n.stage == "run" and n.op != "constant"]


def test_an_embedding_reads_what_the_head_packed() -> None:
    program = qg.compile(lambda ids: tied(Q, ids), IDS, target="cpu", passes=PASSES)
    assert ops(program).count("packed_rows") == 1
    assert "take" not in ops(program)
    assert mx.array_equal(program(IDS), tied(Q, IDS, of=mx)).item()
    plain = qg.compile(lambda ids: tied(Q, ids), IDS, target="cpu", passes=[])
    filled = 320 / 300  # tiles are of 64 rows
    assert program.weight_bytes == pytest.approx(filled * plain.weight_bytes)


def test_of_a_weight_that_is_quantized_here() -> None:
    program = qg.compile(lambda ids: tied(qg.quantize(W), ids), IDS, target="cpu", passes=PASSES)
    assert "take" not in ops(program)
    assert [n.op for n in program.plan.graph.nodes if n.stage == "pack"] == [
        "quantize", "pack_weight",
    ]  # fmt: skip
    assert mx.array_equal(program(IDS), tied(Q, IDS, of=mx)).item()


@pytest.mark.parametrize(
    "other",
    [
        lambda ids: tied(Q, ids) + qg.dequantize(*Q)[0, 0],
        lambda ids: tied(Q, ids) + qg.take(Q[1], mx.array([0]), axis=1)[0],
        lambda ids: (tied(Q, ids), qg.add(Q[1], 1.0)),
    ],
    ids=["dequantized as a whole", "by columns", "added to"],
)
def test_what_is_kept_anyway_is_read_as_it_is(other: Any) -> None:
    program = qg.compile(other, IDS, target="cpu", passes=PASSES)
    assert "packed_rows" not in ops(program)


def test_parameters_are_prepared_once() -> None:
    program = qg.compile(
        lambda q, ids: tied(q, ids), tuple(Q), IDS, parameters=[0], target="cpu", passes=PASSES
    )
    assert "take" not in ops(program)
    assert mx.array_equal(program(program.prepare(tuple(Q)), IDS), tied(Q, IDS, of=mx)).item()
