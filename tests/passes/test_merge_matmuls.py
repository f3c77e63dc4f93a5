"""`merge-matmuls`: products of one input become one; text, numbers, near misses, loops."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.analysis.verify import verify
from qgraph.passes import EliminateDeadCode, HoistQuantize, MergeMatmuls
from qgraph.target import Target
from tests.support import reference
from tests.support.arrays import to_numpy

CUDA = Target(mx.Device(mx.cpu, 0), "cuda", "sm_90", 2)
"""What the pass decides for a GPU, carried out on the CPU."""
X = mx.random.normal((1, 64), key=mx.random.key(0))
MODES = [("affine", 4, 64), ("affine", 8, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


def weight(n: int, seed: int, mode: str = "affine", bits: int = 4, group: int = 32) -> Any:
    w = mx.random.normal((n, 64), key=mx.random.key(seed)) / 8
    return mx.quantize(w, group_size=group, bits=bits, mode=mode)


A, B, C = weight(32, 1), weight(64, 2), weight(16, 3)


def merged(fn: Any, *args: Any, **options: Any) -> qg.Plan:
    passes = [MergeMatmuls(CUDA), HoistQuantize(), EliminateDeadCode()]
    return qg.optimize(qg.trace(fn, *args, name="f", **options), passes=passes, target="cpu")


def products(plan: qg.Plan) -> list[Any]:
    return [n for _, n in plan.graph.walk() if n.op in ("quantized_matmul", "gather_qmm")]


def test_text() -> None:
    plan = merged(lambda x: [qg.quantized_matmul(x, *w, group_size=32) for w in (A, B)], X)
    verify(plan.graph)
    assert plan.graph.format(origins=False) == "\n".join(
        [
            "graph f(x: f32[1,64]) -> (f32[1,32], f32[1,64])",
            "  pack (once):",
            "    A.0_merged: u32[96,8] = concatenate([@A.0, @B.0]) {axis=-2}",
            "    A.1_merged: f32[96,2] = concatenate([@A.1, @B.1]) {axis=-2}",
            "    A.2_merged: f32[96,2] = concatenate([@A.2, @B.2]) {axis=-2}",
            "  %0: f32[1,96] = quantized_matmul(x, A.0_merged, A.1_merged, A.2_merged) "
            "{bits=4, group_size=32}",
            "  %1: f32[1,32], %2: f32[1,64] = split(%0) {axis=1, indices_or_sections=(32,)}",
            "  return %1, %2",
        ]
    )


@pytest.mark.parametrize(("mode", "bits", "group"), MODES)
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_numbers_are_the_very_same(
    mode: str, bits: int, group: int, transpose: bool, rows: int
) -> None:
    settings = {"mode": mode, "bits": bits, "group_size": group}
    weights = [weight(64, i, mode, bits, group) for i in range(3)]
    x = mx.random.normal((2, rows, 64), key=mx.random.key(9))

    def fn(x: Any) -> Any:
        return [qg.quantized_matmul(x, *w, transpose=transpose, **settings) for w in weights]

    plan = merged(fn, x)
    assert len(products(plan)) == 1
    optimized = qg.compile(plan.graph, passes=[], target="cpu")(x)
    for y, plain, parts in zip(optimized, fn(x), weights, strict=True):
        assert mx.array_equal(y, plain).item()
        dense = reference.dequantize(*[to_numpy(p) for p in parts], **settings)
        exact = to_numpy(x).astype(np.float64) @ (dense.T if transpose else dense)
        assert reference.relative_error(to_numpy(y), exact) < 1e-5


def test_parameters_and_loops() -> None:
    def fn(x: Any, a: Any, b: Any) -> Any:
        def body(_: Any, h: Any) -> Any:
            def inner(_: Any, h: Any) -> Any:
                one, two = (qg.quantized_matmul(h, *w, group_size=32) for w in (a, b))
                return qg.tanh(one + two)

            return qg.fori_loop(0, 2, inner, h)

        return qg.fori_loop(0, 3, body, x)

    a, b = weight(64, 4), weight(64, 5)
    plan = merged(fn, X, a, b, parameters=[1, 2])
    assert [n.output.shape for n in products(plan)] == [(1, 128)]
    stages = {n.stage for n in plan.graph.nodes if n.op == "concatenate"}
    assert stages == {"prepare"}
    program = qg.compile(plan.graph, passes=[], target="cpu")
    np.testing.assert_array_equal(program(X, a, b), fn(X, a, b))


def test_experts() -> None:
    gate, up = (
        mx.quantize(mx.random.normal((4, 32, 64), key=mx.random.key(i)), group_size=32)
        for i in (1, 2)
    )
    x = mx.random.normal((5, 1, 64), key=mx.random.key(3))
    ids = mx.array([0, 3, 1, 1, 2], mx.uint32)

    def fn(x: Any, ids: Any) -> Any:
        return [qg.gather_qmm(x, *w, rhs_indices=ids, group_size=32) for w in (gate, up)]

    plan = merged(fn, x, ids)
    assert [n.output.shape for n in products(plan)] == [(5, 1, 64)]
    for y, plain in zip(qg.compile(plan.graph, passes=[])(x, ids), fn(x, ids), strict=True):
        assert mx.array_equal(y, plain).item()


def left(fn: Any, *args: Any, **options: Any) -> qg.Plan:
    graph = qg.trace(fn, *args, **options)
    assert MergeMatmuls(CUDA)(graph) is graph
    return qg.optimize(graph, passes=[MergeMatmuls(CUDA)], target="cpu")


def test_near_misses() -> None:
    def both(a: Any, b: Any, x: Any = X, y: Any = None, **options: Any) -> Any:
        return lambda x, y=y: [
            qg.quantized_matmul(x, *a, group_size=32),
            qg.quantized_matmul(x if y is None else y, *b, **{"group_size": 32} | options),
        ]

    left(both(A, weight(32, 2, bits=8), bits=8), X)  # other bits
    left(both(A, weight(32, 2, group=64), group_size=64), X)  # other groups
    left(both(A, [p.astype(mx.float16) if p.dtype == mx.float32 else p for p in B]), X)
    left(both(A, B), X, X + 1)  # another input
    left(both(A, B, stream="cpu"), X)  # a stream of its own

    def tied(x: Any) -> Any:
        rows = qg.dequantize(A[0][:2], A[1][:2], A[2][:2], group_size=32)
        used = qg.take(qg.tensor(A[0]), mx.array([1]), axis=0)
        return both(A, B)(x), rows, used

    left(tied, X)
    left(lambda x, *w: both(w[:3], B)(x), X, *A)  # it changes from call to call


def test_a_split_that_costs_more_is_refused() -> None:
    x = mx.random.normal((1 << 14, 64))
    plan = left(lambda x: [qg.quantized_matmul(x, *w, group_size=32) for w in (A, B)], x)
    refused = [e for e in plan.ledger() if e.decision == "refused"]
    assert "splitting the result costs" in refused[0].reason


def test_cpus_are_left_alone() -> None:
    graph = qg.trace(lambda x: [qg.quantized_matmul(x, *w, group_size=32) for w in (A, B)], X)
    assert MergeMatmuls(Target(mx.Device(mx.cpu, 0), "cpu", "x86_64", 2))(graph) is graph


def test_weights_read_in_other_bodies_too_stay() -> None:
    def pair(h: Any) -> Any:
        return [qg.sum(qg.quantized_matmul(h, *w, group_size=32)) for w in (A, B)]

    def outside(x: Any) -> Any:
        y = qg.quantized_matmul(x, *A, group_size=32)
        return y, qg.fori_loop(0, 2, lambda _, h: h + sum(pair(h)), x)

    def branches(x: Any) -> Any:
        return qg.cond(qg.sum(x) > 0, lambda h: sum(pair(h)), lambda h: pair(h)[0], x)

    for fn, count in ((outside, 3), (branches, 3)):
        assert len(products(merged(fn, X))) == count


def refusals(plan: qg.Plan) -> list[str]:
    return [e.reason for e in plan.ledger() if e.decision == "refused"]


@pytest.mark.parametrize("part", range(3))
def test_a_weight_of_which_something_else_reads_a_part_stays(part: int) -> None:
    name = ("w", "scales", "biases")[part]

    def read(x: Any) -> Any:
        other = qg.take(qg.tensor(A[part]), mx.array([1]), axis=0)
        return [qg.quantized_matmul(x, *w, group_size=32) for w in (A, B)], other

    def returned(x: Any) -> Any:
        return [qg.quantized_matmul(x, *w, group_size=32) for w in (A, B)], qg.tensor(A[part])

    for fn, who in ((read, "take"), (returned, "the caller")):
        (reason,) = refusals(left(fn, X))
        assert reason == (
            f"not merged: {who} reads `{name}` of its weight too, and both forms would stay; "
            f"let products of this input alone read it, or give {who} a copy"
        )


def test_the_others_merge_without_it() -> None:
    def fn(x: Any) -> Any:
        products = [qg.quantized_matmul(x, *w, group_size=32) for w in (A, B, C)]
        return products, qg.tensor(A[1]) * 2

    plan = merged(fn, X)
    assert sorted(n.output.shape[-1] for n in products(plan)) == [32, 80]
    (refused,) = [e for e in plan.ledger() if e.decision == "refused"]
    assert refused.name == "A.0"
    found = [e.reason for e in plan.ledger() if e.decision == "merged"]
    assert found == ["one product for B.0 + C.0"] * 2


def test_slices_of_a_weight() -> None:
    def halves(x: Any, whole: bool = False, first: int = 32) -> Any:
        w = [qg.tensor(part) for part in B]
        parts = [[part[rows] for part in w] for rows in (slice(first), slice(32, 64))]
        found = [qg.quantized_matmul(x, *half, group_size=32) for half in parts]
        return found, qg.quantized_matmul(x * 2, *w, group_size=32) if whole else None

    assert [n.output.shape for n in products(merged(halves, X))] == [(1, 64)]
    first = refusals(left(lambda x: halves(x, whole=True), X))[0]
    assert "quantized_matmul reads `w` of its weight too" in first
    assert "read rows of `w` twice" in refusals(left(lambda x: halves(x, first=40), X))[0]


def test_what_a_loop_carries_is_read() -> None:
    def fn(x: Any) -> Any:
        def turn(_: Any, carry: Any) -> Any:
            h, scales = carry
            pair = [qg.sum(qg.quantized_matmul(h, *w, group_size=32)) for w in (A, B)]
            return h + sum(pair), scales * 0.5

        return qg.fori_loop(0, 2, turn, (x, qg.tensor(A[1])))

    assert "reads `scales` of its weight too" in refusals(left(fn, X))[0]


def test_the_ledger_names_weights_that_the_program_quantizes() -> None:
    up, gate = mx.ones((32, 64)), mx.ones((64, 64))
    mx.eval(up, gate)
    plan = merged(lambda x: [qg.quantized_matmul(x, w, group_size=32) for w in (up, gate)], X)
    found = [(e.name, e.reason) for e in plan.ledger() if e.decision == "merged"]
    assert found == [(name, "one product for up + gate") for name in ("up", "gate")]


def test_weights_that_are_computed_anew_each_time_stay() -> None:
    def pair(make: Any) -> Any:
        return lambda x: [qg.quantized_matmul(x, *make(w), group_size=32) for w in (A, B)]

    def kept(w: Any) -> Any:
        return [qg.keep(qg.tensor(part)) for part in w]

    def drawn(w: Any) -> Any:
        key = qg.tensor(mx.random.key(w[0].shape[0]))
        return qg.quantize(qg.random.normal((w[0].shape[0], 64), key=key), group_size=32)

    def looped(w: Any) -> Any:
        dense = qg.dequantize(*w, group_size=32)
        return qg.quantize(qg.fori_loop(0, 2, lambda _, h: qg.tanh(h), dense), group_size=32)

    for make in (kept, drawn, looped):
        left(pair(make), X)
