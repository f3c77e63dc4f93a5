"""`legalize`: what each target cannot run takes a form that it can, with the same numbers.

CUDA and Metal are stood in for by targets of those backends on the CPU: the graph is theirs, and
what runs it here checks the numbers.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.ir import Graph
from qgraph.passes import Legalize
from qgraph.target import Target
from tests.support import reference
from tests.support.arrays import to_numpy

CPU = Target(mx.Device(mx.cpu, 0), "cpu", "x86_64", 2)
CUDA = Target(mx.Device(mx.cpu, 0), "cuda", "sm_90", 2)
METAL = Target(mx.Device(mx.cpu, 0), "metal", "applegpu_g15s", 2)
FORMATS = [("affine", 32, 4), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]
W = mx.random.normal((96, 64), key=mx.random.key(0))
X = mx.random.normal((3, 64), key=mx.random.key(1))


def legal(fn: Any, target: Target, *args: Any) -> tuple[Graph, qg.Plan]:
    graph = qg.trace(fn, *args, name="f")
    plan = qg.optimize(graph, target=target, passes=[Legalize(target)])
    return graph, plan


def same_numbers(plan: qg.Plan, graph: Graph, *args: Any) -> None:
    new = qg.compile(plan.graph, passes=[], target="cpu")(*args)
    old = qg.compile(graph, passes=[], target="cpu")(*args)
    np.testing.assert_allclose(to_numpy(new), to_numpy(old), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_gather_mm_of_half_precision_on_cpus(dtype: mx.Dtype) -> None:
    x = mx.random.normal((2, 1, 64), key=mx.random.key(2)).astype(dtype)
    w = mx.random.normal((3, 64, 32), key=mx.random.key(3)).astype(dtype)
    ids = mx.array([2, 0], dtype=mx.uint32)
    graph, plan = legal(lambda a: qg.gather_mm(a, w, rhs_indices=ids), CPU, x)
    assert [n.op for n in plan.graph.nodes if n.op != "constant"] == [
        "astype", "astype", "gather_mm", "astype",
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="only supports float32"):
        mx.eval(qg.compile(graph, passes=[], target="cpu")(x))
    found = qg.compile(graph, target="cpu")(x)
    assert found.dtype == dtype
    wanted = np.matmul(to_numpy(x).astype(np.float64), to_numpy(w).astype(np.float64)[[2, 0]])
    assert reference.relative_error(to_numpy(found), wanted) < (
        4e-3 if dtype != mx.float16 else 5e-4
    )


@pytest.mark.parametrize(
    "stream", [mx.cpu, mx.Device(mx.cpu, 0), "cpu", mx.default_stream(mx.cpu)], ids=repr
)
def test_what_a_user_puts_on_the_cpu_follows_its_rules(stream: Any) -> None:
    x, w = mx.ones((2, 1, 64), mx.float16), mx.ones((2, 64, 32), mx.float16)
    ids = mx.array([1, 0], dtype=mx.uint32)
    for target in (CUDA, METAL):
        _, plan = legal(lambda a: qg.gather_mm(a, w, rhs_indices=ids, stream=stream), target, x)
        (product,) = [n for n in plan.graph.nodes if n.op == "gather_mm"]
        assert (product.output.dtype, plan.graph.outputs[0].dtype) == (mx.float32, mx.float16)
        assert qg.compile(plan.graph, passes=[], target="cpu")(x)[0, 0, 0].item() == 64


def test_gather_mm_of_float32_is_left_alone() -> None:
    w = mx.ones((3, 64, 32))
    graph, plan = legal(lambda a: qg.gather_mm(a, w), CPU, mx.ones((3, 1, 64)))
    assert plan.graph is graph


@pytest.mark.parametrize(("mode", "group", "bits"), FORMATS)
def test_views_of_packed_weights_on_cuda(mode: str, group: int, bits: int) -> None:
    parts = mx.quantize(W, group_size=group, bits=bits, mode=mode)

    def fn(x: Any) -> Any:
        sliced = [qg.tensor(p)[::2] for p in parts]
        return qg.quantized_matmul(x, *sliced, group_size=group, bits=bits, mode=mode)

    graph, plan = legal(fn, CUDA, X)
    product = next(n for n in plan.graph.nodes if n.op == "quantized_matmul")
    packed = [v for name in ("w", "scales", "biases") if (v := product.value(name)) is not None]
    assert [v.node.op for v in packed] == ["contiguous"] * len(parts)
    same_numbers(plan, graph, X)
    assert "made contiguous" in "".join(str(e) for e in plan.ledger())
    assert legal(fn, CPU, X)[1].steps[0].changed is False


def test_in_loops_and_whole_weights_on_cuda() -> None:
    square = mx.quantize(W[:64], group_size=32, bits=4)

    def step(i: Any, h: Any) -> Any:
        sliced = [qg.tensor(p)[::-1] for p in square]
        return qg.tanh(qg.quantized_matmul(h, *sliced, group_size=32, bits=4))

    graph, plan = legal(lambda x: qg.fori_loop(0, 2, step, x), CUDA, X)
    assert sum(n.op == "contiguous" for _, n in plan.graph.walk()) == 3
    same_numbers(plan, graph, X)
    graph, plan = legal(lambda x: qg.quantized_matmul(x, *square, group_size=32, bits=4), CUDA, X)
    assert plan.graph is graph


@pytest.mark.parametrize(("mode", "group", "bits"), FORMATS)
def test_columns_that_metal_does_not_write(mode: str, group: int, bits: int) -> None:
    w = mx.random.normal((1024, 96), key=mx.random.key(4)) / 32
    parts = mx.quantize(w, group_size=group, bits=bits, mode=mode)
    x = mx.random.normal((1, 1024), key=mx.random.key(5))

    def fn(x: Any) -> Any:
        return qg.quantized_matmul(
            x, *parts, transpose=False, group_size=group, bits=bits, mode=mode
        )

    graph, plan = legal(fn, METAL, x)
    assert "quantized_matmul" not in str(plan.graph)
    same_numbers(plan, graph, x)
    assert "N=96" in str(plan.ledger()[0])


@pytest.mark.parametrize("shape", [(1024, 128), (512, 96)])
def test_what_metal_runs_is_left_alone(shape: tuple[int, int]) -> None:
    parts = mx.quantize(mx.ones(shape), group_size=32, bits=4)
    x = mx.ones((1, shape[0]))
    graph, plan = legal(
        lambda x: qg.quantized_matmul(x, *parts, transpose=False, group_size=32), METAL, x
    )
    assert plan.graph is graph


@pytest.mark.parametrize(("group", "bits"), [(64, 4), (64, 8), (128, 4)])
def test_rows_of_one_group_on_hopper(group: int, bits: int) -> None:
    w = mx.random.normal((96, group), key=mx.random.key(6))
    parts = mx.quantize(w, group_size=group, bits=bits)
    x = mx.random.normal((2, 3, group), key=mx.random.key(7))

    def fn(x: Any) -> Any:
        return qg.quantized_matmul(x, *parts, group_size=group, bits=bits)

    graph, plan = legal(fn, CUDA, x)
    assert "quantized_matmul" not in str(plan.graph)
    same_numbers(plan, graph, x)
    assert "rows of one group" in str(plan.ledger()[0])


@pytest.mark.parametrize(
    ("rows", "n", "k", "group", "mode"),
    [
        (1, 96, 64, 64, "affine"),  # one row is for qmv
        (3, 96, 128, 64, "affine"),
        (3, 96, 32, 32, "affine"),
        (3, 94, 64, 64, "affine"),
        (3, 96, 32, 32, "mxfp4"),
    ],
)
def test_what_hopper_runs_is_left_alone(rows: int, n: int, k: int, group: int, mode: str) -> None:
    parts = mx.quantize(mx.ones((n, k)), group_size=group, bits=4, mode=mode)
    settings = {"group_size": group, "bits": 4, "mode": mode}
    x = mx.ones((rows, k))
    graph, plan = legal(lambda x: qg.quantized_matmul(x, *parts, **settings), CUDA, x)
    assert plan.graph is graph


def test_rows_of_one_group_elsewhere_are_left_alone() -> None:
    parts = mx.quantize(mx.ones((96, 64)), group_size=64, bits=4)
    ampere = Target(mx.Device(mx.cpu, 0), "cuda", "sm_80", 2)
    for target in (CPU, ampere):
        graph, plan = legal(lambda x: qg.quantized_matmul(x, *parts), target, mx.ones((3, 64)))
        assert plan.graph is graph
