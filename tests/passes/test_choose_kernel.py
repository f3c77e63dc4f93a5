"""`choose-kernel`: the kernel chosen becomes two ops, whose result is that of the product."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.kernels import Problem, kernel
from qgraph.kernels.choice.tuner import Choice
from qgraph.kernels.cpu.library import missing
from qgraph.kernels.matmul.tiled.product import Tiled
from qgraph.kernels.matmul.tiled.untiled import Untiled
from qgraph.passes import (
    ChooseKernel,
    EliminateCommonSubexpressions,
    EliminateDeadCode,
    HoistQuantize,
    choose_kernel,
)
from qgraph.target import Target
from tests.support import reference
from tests.support.arrays import to_numpy
from tests.support.compiler import needs_compiler

CPU = Target(mx.Device(mx.cpu, 0), "cpu", "x86_64", 2)
W = mx.random.normal((96, 64), key=mx.random.key(0)) / 8
Q = mx.quantize(W, group_size=32)
X = mx.random.normal((5, 64), key=mx.random.key(1))
PASSES = [
    ChooseKernel(CPU, min_flops=0),
    HoistQuantize(),
    EliminateCommonSubexpressions(),
    EliminateDeadCode(),
]
PLAIN = "quantized_matmul"
OWN_LAYOUT = {"dense", "dense+host-blas", "shard2+qmm"}
KERNELS = ["pad8+qmm", "chunk4+qmm", "dequantize+matmul", "simd", "host-blas", *sorted(OWN_LAYOUT)]


@pytest.fixture(params=KERNELS)
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The choice is taken from the tuner: these tests are of what becomes of it."""
    name: str = request.param
    force(monkeypatch, name)
    return name


def force(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def choose(problem: Problem, names: Any, **_: Any) -> Choice:
        # The pass asks again without what runs from the host; the rest is forced.
        offered = not kernel(name).host or any(kernel(n).host for n in names)
        if offered:
            return Choice(name, "table", 1.0, (("qmm", 1000.0),))
        return Choice(names[0], "table", 1000.0)

    monkeypatch.setattr(choose_kernel, "choose", choose)


def expected(x: mx.array) -> Any:
    dense = reference.dequantize(*[to_numpy(p) for p in Q], 32, 4, "affine")
    return to_numpy(x).astype(np.float64) @ dense.T


def plan(fn: Any, *args: Any, **options: Any) -> qg.Plan:
    return qg.optimize(qg.trace(fn, *args, name="f", **options), passes=PASSES, target="cpu")


def test_numbers_and_places(forced: str) -> None:
    made = plan(lambda x: qg.quantized_matmul(x, *Q, group_size=32), X)
    (product,) = [n for n in made.graph.nodes if n.op == "packed_matmul"]
    assert product.kernel == forced
    packed = [n.stage for n in made.graph.nodes if n.op == "pack_weight"]
    assert packed == (["pack"] if forced in OWN_LAYOUT else [])
    program = qg.compile(made.graph, passes=[], target="cpu")
    assert reference.relative_error(to_numpy(program(X)), expected(X)) < 2e-6
    assert reference.relative_error(to_numpy(program(X * 2)), expected(X * 2)) < 2e-6
    (entry,) = [e for e in made.ledger() if e.made_by == "choose-kernel"]
    assert forced in entry.reason


def test_plans_of_many_rows_share_what_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "shard2+qmm")
    model = qg.jit(lambda x: qg.quantized_matmul(x, *Q, group_size=32), target="cpu", passes=PASSES)
    for rows in (1, 5, 7):
        assert model(X[:1] if rows == 1 else mx.ones((rows, 64))).shape == (rows, 96)
        assert [n.kernel for n in model.plan.graph.nodes if n.op == "packed_matmul"]
    assert model.weight_bytes == sum(part.nbytes for part in Q)


def test_float_weights_are_packed_from_their_quantize(forced: str) -> None:
    made = plan(lambda x: qg.quantized_matmul(x, W, group_size=32), X)
    stages = {n.op: n.stage for n in made.graph.nodes if n.op != "constant"}
    own = {"pack_weight": "pack"} if forced in OWN_LAYOUT else {}
    assert stages == {"quantize": "pack", **own, "packed_matmul": "run"}
    program = qg.compile(made.graph, passes=[], target="cpu")
    assert reference.relative_error(to_numpy(program(X)), expected(X)) < 2e-6


def test_parameters_are_prepared(forced: str) -> None:
    made = plan(lambda w, x: qg.quantized_matmul(x, w, group_size=32), W, X, parameters=[0])
    assert {n.stage for n in made.graph.nodes if n.op == "quantize"} == {"prepare"}
    program = qg.compile(made.graph, passes=[], target="cpu")
    result = program(program.prepare(W), X)
    assert reference.relative_error(to_numpy(result), expected(X)) < 2e-6


def test_in_loops(forced: str) -> None:
    def fn(x: Any) -> Any:
        def body(i: Any, h: Any) -> Any:
            return qg.tanh(qg.quantized_matmul(h, *Q, group_size=32)[:, :64])

        return qg.fori_loop(0, 2, lambda i, h: qg.fori_loop(0, 2, body, h), x)

    made = plan(fn, X)
    inside = [n.kernel for _, n in made.graph.walk() if n.op in ("packed_matmul", PLAIN)]
    assert inside == [forced]
    results = [qg.compile(g, passes=[], target="cpu")(X) for g in (made.source, made.graph)]
    assert mx.allclose(*results, atol=1e-5)


def test_host_kernels_between_stretches_and_in_long_loops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force(monkeypatch, "host-blas")
    made = plan(lambda x: qg.exp(qg.quantized_matmul(qg.tanh(x), *Q, group_size=32)) + 1, X)
    program = qg.compile(made.graph, passes=[], target="cpu")
    wanted = np.exp(expected(mx.tanh(X))) + 1
    assert reference.relative_error(to_numpy(program(X)), wanted) < 1e-5


@needs_compiler
def test_a_host_kernel_must_save_what_leaving_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(problem: Problem, names: Any, **_: Any) -> Choice:
        us = {"qmm": 100.0, "simd": {64: 20.0, 96: 80.0}[problem.n]}
        best = min((name for name in names if name in us), key=us.__getitem__)
        return Choice(best, "table", us[best], (("qmm", us["qmm"]),))

    monkeypatch.setattr(choose_kernel, "choose", choose)
    for n, kernels in ((64, ["simd"]), (96, [])):
        w = mx.quantize(mx.random.normal((n, 64), key=mx.random.key(6)) / 16)

        def fn(x: Any, w: Any = w) -> Any:
            def turn(_: Any, z: Any, w: Any = w) -> Any:
                return qg.tanh(qg.quantized_matmul(z, *w)[:, :64])

            return qg.quantized_matmul(qg.fori_loop(0, 3, turn, x), *w)

        graph = ChooseKernel(CPU, min_flops=0)(qg.trace(fn, X))
        assert [n.kernel for _, n in graph.walk() if n.op == "packed_matmul"] == 2 * kernels
        dense = reference.dequantize(*[to_numpy(p) for p in w], 64, 4, "affine")
        h = to_numpy(X).astype(np.float64)
        for _ in range(3):
            h = np.tanh(h @ dense.T)[:, :64]
        y = qg.compile(graph, passes=[], target="cpu")(X)
        assert reference.relative_error(to_numpy(y), h @ dense.T) < 1e-5


@needs_compiler
def test_products_of_one_input_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(problem: Problem, names: Any, **_: Any) -> Choice:
        us = {"qmm": 100.0, "simd": 80.0}
        best = min((name for name in names if name in us), key=us.__getitem__)
        return Choice(best, "table", us[best], (("qmm", us["qmm"]),))

    monkeypatch.setattr(choose_kernel, "choose", choose)

    def kernels(fn: Any) -> list[str]:
        graph = ChooseKernel(CPU, min_flops=0)(qg.trace(fn, X))
        return [n.kernel for n in graph.nodes if n.op == "packed_matmul"]

    def product(x: Any) -> Any:
        return qg.quantized_matmul(x, *Q, group_size=32)

    assert kernels(lambda x: [product(x), product(x), product(x)]) == ["simd"] * 3
    assert kernels(lambda x: [product(x), product(qg.sin(x)), product(qg.cos(x))]) == []


def test_small_products_are_left_to_mlx() -> None:
    def kernels(n: int) -> list[str]:
        w = mx.quantize(mx.random.normal((n, 512)))
        graph = qg.trace(lambda x: qg.quantized_matmul(x, *w), qg.spec((1, 512)))
        return [n.kernel for n in ChooseKernel(CPU)(graph).nodes if n.op == "packed_matmul"]

    assert kernels(64) == []
    assert kernels(2048) == (["simd"] if missing() is None else [])


@pytest.mark.parametrize(("arch", "joined"), [("sm_80", 0), ("sm_90a", 2)])
def test_regions_take_small_products(
    arch: str, joined: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 6: on Hopper GPUs a launch makes up for what `tiled` takes longer alone."""
    monkeypatch.setattr(Tiled, "run", lambda self, *given: Untiled().run(*given))
    gpu = Target(mx.Device(mx.gpu, 0), "cuda", arch, 2)
    weights = [mx.quantize(mx.random.normal((n, 512)).astype(mx.bfloat16)) for n in (64, 1024)]
    with mx.stream(mx.cpu):
        graph = qg.trace(
            lambda x: [qg.quantized_matmul(x, *w) for w in weights], qg.spec((1, 512), mx.bfloat16)
        )
        after = ChooseKernel(gpu)(graph)
    assert [n.kernel for n in after.nodes if n.op == "packed_matmul"] == ["tiled"] * joined


def test_leaves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unchanged(fn: Any, *args: Any) -> None:
        graph = qg.trace(fn, *args)
        assert ChooseKernel(CPU, min_flops=0)(graph) is graph

    force(monkeypatch, "shard2+qmm")
    unchanged(lambda x, *q: qg.quantized_matmul(x, *q, group_size=32), X, *Q)
    unchanged(lambda x: qg.quantized_matmul(x, *Q, group_size=32, stream="cpu"), X)
    batch = mx.quantize(mx.random.normal((2, 96, 64)))
    unchanged(lambda x: qg.quantized_matmul(x, *batch), mx.ones((2, 5, 64)))
    small = qg.trace(lambda x: qg.quantized_matmul(x, *Q, group_size=32), X)
    assert ChooseKernel(CPU)(small) is small
    force(monkeypatch, "qmm")
    unchanged(lambda x: qg.quantized_matmul(x, *Q, group_size=32), X)
    others = (("qmm", 1.04),)
    monkeypatch.setattr(
        choose_kernel, "choose", lambda problem, **_: Choice("shard2+qmm", "table", 1.0, others)
    )
    unchanged(lambda x: qg.quantized_matmul(x, *Q, group_size=32), X)


def test_the_problem_is_that_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Problem] = []

    def note(problem: Problem, **_: Any) -> Choice:
        seen.append(problem)
        return Choice("qmm", "default", 1.0)

    monkeypatch.setattr(choose_kernel, "choose", note)
    w = mx.quantize(mx.ones((64, 128), mx.float16), mode="mxfp4")
    x = qg.spec((2, 3, 64), mx.bfloat16)
    plan(lambda x: qg.quantized_matmul(x, *w, transpose=False, mode="mxfp4"), x)
    assert seen == [
        Problem(6, 128, 64, mx.bfloat16, "mxfp4", 4, 32, False, mx.uint8, "cpu", "x86_64", 2)
    ]


def test_gathered_products(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = mx.quantize(mx.random.normal((3, 96, 64), key=mx.random.key(4)), group_size=32)
    x = mx.random.normal((7, 1, 64), key=mx.random.key(5))
    ids = mx.array([2, 0, 2, 1, 0, 0, 2], mx.uint32)
    dense = reference.dequantize(*[to_numpy(p) for p in experts], 32, 4, "affine")
    exact = to_numpy(x).astype(np.float64) @ dense.swapaxes(-1, -2)[np.array(ids)]

    def fn(x: Any, ids: Any) -> Any:
        return qg.gather_qmm(x, *experts, rhs_indices=ids, group_size=32)

    for name in ("sort+gather_qmm", "dequantize+gather_mm", "group+simd", "group+host-blas"):
        force(monkeypatch, name)
        made = plan(fn, x, ids)
        assert [n.kernel for n in made.graph.nodes if n.op == "packed_gather"] == [name]
        program = qg.compile(made.graph, passes=[], target="cpu")
        assert program(x, ids).shape == (7, 1, 96)
        assert reference.relative_error(to_numpy(program(x, ids)), exact) < 2e-6


def test_many_rows_to_few_experts_are_grouped() -> None:
    """By the cost model: MLX decodes an expert again for each row."""
    experts = mx.quantize(mx.random.normal((4, 512, 512), key=mx.random.key(4)))
    ids = qg.spec((256,), mx.uint32)
    graph = qg.trace(
        lambda x, i: qg.gather_qmm(x, *experts, rhs_indices=i), qg.spec((256, 1, 512)), ids
    )
    kernels = [n.kernel for n in ChooseKernel(CPU)(graph).nodes if n.op == "packed_gather"]
    assert kernels == ["group+simd" if missing() is None else "group+host-blas"]


def test_a_budget_goes_to_what_gains_most_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {n: mx.quantize(mx.random.normal((n, 64)), group_size=32) for n in (32, 64, 128)}
    gains = {32: 15.0, 64: 40.0, 128: 30.0}  # dense copies of 8, 16 and 32 KiB

    def choose(problem: Problem, budget: int, **_: Any) -> Choice:
        if budget:
            return Choice("dense", "table", 100.0 - gains[problem.n], (("qmm", 100.0),))
        return Choice("qmm", "table", 100.0)

    monkeypatch.setattr(choose_kernel, "choose", choose)

    def fn(x: Any) -> Any:
        return [qg.quantized_matmul(x, *w, group_size=32) for w in weights.values()]

    def kept(kib: int) -> list[int]:
        graph = ChooseKernel(CPU, min_flops=0, budget=kib << 10)(qg.trace(fn, X))
        return [n.output.shape[-1] for n in graph.nodes if n.op == "packed_matmul"]

    assert (kept(0), kept(7), kept(8), kept(16)) == ([], [], [32], [64])
    assert (kept(24), kept(55), kept(56)) == ([32, 64], [32, 64], [32, 64, 128])
