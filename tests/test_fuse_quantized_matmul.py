"""`fuse-quantized-matmul` and `sink-dequantize`: every numbered case, its text and its numbers.

Numbers are compared with NumPy in float64 on the weight that `tests/reference.py` dequantizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.ir import Graph
from qgraph.passes import (
    EliminateDeadCode,
    FuseQuantizedMatmul,
    HoistQuantize,
    SinkDequantize,
)
from qgraph.plan import Plan
from tests import reference
from tests.arrays import to_numpy

FORMATS = {
    "affine": {"group_size": 32, "bits": 4, "mode": "affine"},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}
PASSES = [SinkDequantize(), FuseQuantizedMatmul(), EliminateDeadCode()]
KEY = mx.random.key(3)
N, K = 96, 64
W = mx.random.normal((N, K), key=KEY)
BATCH = mx.random.normal((3, N, K), key=KEY)
X = mx.random.normal((5, K), key=mx.random.key(4))


class Weight:
    """A packed weight in one of three places, and its dense form in float64."""

    def __init__(self, mode: str, w: mx.array = W, dtype: mx.Dtype = mx.float32) -> None:
        self.settings = FORMATS[mode]
        self.parts = mx.quantize(w.astype(dtype), **self.settings)
        arrays = [to_numpy(p) for p in self.parts]
        biases = arrays[2] if len(arrays) > 2 else None
        self.dense = reference.dequantize(
            arrays[0], arrays[1], biases, **{k: self.settings[k] for k in self.settings}
        )

    def dequantize(self, parts: Any = None, **options: Any) -> Any:
        w, scales, *biases = self.parts if parts is None else parts
        return qg.dequantize(w, scales, *biases, **self.settings, **options)


def optimized(fn: Callable[..., Any], *args: Any, passes: Any = None) -> Plan:
    return qg.optimize(qg.trace(fn, *args, name="f"), target="cpu", passes=passes or PASSES)


def ops(graph: Graph) -> list[str]:
    return [n.op for _, n in graph.walk() if n.op != "constant"]


def check(plan: Plan, args: list[mx.array], expected: Any, tolerance: float = 2e-6) -> None:
    """Both graphs give what NumPy gives, and results of the same types."""
    assert [v.type for v in plan.graph.outputs] == [v.type for v in plan.source.outputs]
    for graph in (plan.source, plan.graph):
        results = qg.compile(graph, passes=[], target="cpu")(*args)
        found = qg.tree.flatten(results)[0]
        wanted = expected if isinstance(expected, list) else [expected]
        for actual, value in zip(found, wanted, strict=True):
            assert reference.relative_error(to_numpy(actual), value) < tolerance


def reasons(plan: Plan) -> str:
    return "\n".join(e.reason for e in plan.ledger() if e.decision == "refused")


# Case 1: views that keep groups whole.
VIEWS: dict[str, Callable[[Any], Any]] = {
    "T": lambda w: w.T,
    "transpose": lambda w: qg.transpose(w, (1, 0)),
    "negative axes": lambda w: qg.transpose(w, (-1, -2)),
    "swapaxes": lambda w: w.swapaxes(0, 1),
    "moveaxis": lambda w: w.moveaxis(0, -1),
    "twice more": lambda w: w.T.T.T,
    "reshape": lambda w: w.reshape(8, 12, K).reshape(N, K).T,
    "reshape transposed": lambda w: w.reshape(1, N, K).swapaxes(1, 2).reshape(K, N),
    "expand and squeeze": lambda w: qg.expand_dims(w, 0).squeeze(0).T,
    "index of None": lambda w: w[None, :, :].squeeze(0).T,
    "broadcast": lambda w: qg.broadcast_to(w.T, (K, N)),
    "flatten": lambda w: w.reshape(8, 12, K).flatten(0, 1).T,
    "unflatten": lambda w: qg.unflatten(w, 0, (8, 12)).reshape(N, K).T,
    "stop_gradient": lambda w: qg.stop_gradient(w).T,
    "mT": lambda w: w.mT,
}


@pytest.mark.parametrize("mode", FORMATS)
@pytest.mark.parametrize("view", VIEWS)
def test_case_1_transposed_views(mode: str, view: str) -> None:
    weight = Weight(mode)
    plan = optimized(lambda x: x @ VIEWS[view](weight.dequantize()), X)
    assert ops(plan.graph) == ["quantized_matmul"]
    assert "transpose" not in plan.graph.nodes[-1].attrs
    check(plan, [X], to_numpy(X).astype(np.float64) @ weight.dense.T)


def test_case_1_text() -> None:
    w_q, scales, biases = Weight("affine").parts
    plan = optimized(lambda x: x @ qg.dequantize(w_q, scales, biases, 32, 4).T, X)
    assert plan.source.format(origins=False) == (
        "graph f(x: f32[5,64]) -> f32[5,96]\n"
        "  %0: f32[96,64] = dequantize(@w_q, @scales, @biases) {bits=4, group_size=32}\n"
        "  %1: f32[64,96] = transpose(%0)\n"
        "  %2: f32[5,96] = matmul(x, %1)\n"
        "  return %2"
    )
    assert plan.graph.format(origins=False) == (
        "graph f(x: f32[5,64]) -> f32[5,96]\n"
        "  %0: f32[5,96] = quantized_matmul(x, @w_q, @scales, @biases) {bits=4, group_size=32}\n"
        "  return %0"
    )


@pytest.mark.parametrize("mode", FORMATS)
def test_case_1_not_transposed(mode: str) -> None:
    weight = Weight(mode)
    x = mx.random.normal((5, N), key=KEY)
    plan = optimized(lambda x: x @ weight.dequantize(), x)
    assert ops(plan.graph) == ["quantized_matmul"]
    assert plan.graph.nodes[-1].attrs["transpose"] is False
    check(plan, [x], to_numpy(x).astype(np.float64) @ weight.dense)


@pytest.mark.parametrize("shape", [(K,), (2, 5, K), (1, 2, 3, K)])
def test_case_1_shapes_of_x(shape: tuple[int, ...]) -> None:
    weight = Weight("affine")
    x = mx.random.normal(shape, key=KEY)
    plan = optimized(lambda x: x @ weight.dequantize().T, x)
    assert ops(plan.graph) == ["quantized_matmul"]
    check(plan, [x], to_numpy(x).astype(np.float64) @ weight.dense.T)


def test_case_1_a_broadcast_batch_needs_no_copies() -> None:
    weight = Weight("affine")
    plan = optimized(lambda x: x @ qg.broadcast_to(weight.dequantize().T, (7, K, N)), X)
    assert ops(plan.graph) == ["quantized_matmul", "broadcast_to"]
    expected = np.broadcast_to(to_numpy(X).astype(np.float64) @ weight.dense.T, (7, 5, N))
    check(plan, [X], expected)


NEAR_MISSES: dict[str, tuple[Callable[[Any], Any], tuple[int, ...], str]] = {
    "groups are split": (lambda w: w.reshape(N * 2, K // 2).T, (5, 32), "groups do not run whole"),
    "rows are mixed": (
        lambda w: w.reshape(N, 2, 32).swapaxes(0, 1).reshape(N, K).T, (5, K),
        "reshape between dequantize and the product is no view",
    ),
    "a row for all": (
        lambda w: qg.broadcast_to(qg.dequantize(*mx.quantize(W[:1], 32, 4), 32, 4), (9, K)).T,
        (5, K), "one row of the weight is broadcast",
    ),
    "columns are cut": (lambda w: w[:, :32].T, (5, 32), "groups run along the last axis"),
    "arithmetic between": (lambda w: (w * 2.0).T, (5, K), "scale x, the result"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_case_1_near_misses(name: str) -> None:
    view, shape, words = NEAR_MISSES[name]
    weight = Weight("affine")
    x = mx.random.normal(shape, key=KEY)
    plan = optimized(lambda x: x @ view(weight.dequantize()), x)
    assert "quantized_matmul" not in ops(plan.graph)
    assert words in reasons(plan)
    assert bool(words) == bool(reasons(plan))


# Case 2: casts and dtypes.
@pytest.mark.parametrize("x_dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("w_dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("mode", FORMATS)
def test_case_2_dtypes(mode: str, w_dtype: mx.Dtype, x_dtype: mx.Dtype) -> None:
    weight = Weight(mode, dtype=w_dtype)
    x = X.astype(x_dtype)
    plan = optimized(lambda x: x @ weight.dequantize(dtype=w_dtype).T, x)
    assert "matmul" not in ops(plan.graph)
    coarse = {mx.float32: 2e-6, mx.float16: 5e-3, mx.bfloat16: 4e-2}
    tolerance = max(coarse[x_dtype], coarse[w_dtype])
    check(plan, [x], to_numpy(x).astype(np.float64) @ weight.dense.T, tolerance)


@pytest.mark.parametrize("place", ["weight", "activation", "result", "all"])
def test_case_2_casts(place: str) -> None:
    weight = Weight("affine", dtype=mx.float16)

    def fn(x: Any) -> Any:
        w = weight.dequantize().T
        w = w.astype(mx.float32) if place in ("weight", "all") else w
        x = x.astype(mx.float16 if place == "activation" else mx.float32)
        y = x @ w
        return y.astype(mx.bfloat16) if place in ("result", "all") else y

    plan = optimized(fn, X)
    assert "matmul" not in ops(plan.graph)
    tolerance = 4e-2 if place in ("result", "all") else 5e-3
    check(plan, [X], to_numpy(X).astype(np.float64) @ weight.dense.T, tolerance)


def test_case_2_never_less_exact_than_as_written() -> None:
    """Scales of float32 under a float16 product: it runs in float32, not on rounded scales."""
    weight = Weight("affine")
    x = X.astype(mx.float16)
    plan = optimized(lambda x: x @ weight.dequantize().astype(mx.float16).T, x)
    expected = to_numpy(x).astype(np.float64) @ weight.dense.T
    errors = [
        reference.relative_error(to_numpy(qg.compile(g, passes=[])(x)), expected)
        for g in (plan.source, plan.graph)
    ]
    assert errors[1] <= errors[0]


def test_case_2_integers_are_left_alone() -> None:
    weight = Weight("affine")
    plan = optimized(lambda x: x @ weight.dequantize().astype(mx.int32).T.astype(mx.float32), X)
    assert "matmul" in ops(plan.graph)


# Case 3: other spellings of a product.
C = mx.random.normal((N,), key=KEY)
SPELLINGS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "addmm": (lambda x, w: qg.addmm(C, x, w.T), lambda x, w, c: x @ w.T + c),
    "addmm scaled": (lambda x, w: qg.addmm(C, x, w.T, alpha=0.5, beta=2.0),
                     lambda x, w, c: 0.5 * (x @ w.T) + 2 * c),
    "plus": (lambda x, w: x @ w.T + C, lambda x, w, c: x @ w.T + c),
    "scaled": (lambda x, w: (x * 3.0) @ w.T * 0.5, lambda x, w, c: 1.5 * (x @ w.T)),
    "inner": (lambda x, w: qg.inner(x, w), lambda x, w, c: x @ w.T),
    "inner reversed": (lambda x, w: qg.inner(w, x), lambda x, w, c: w @ x.T),
    "tensordot": (lambda x, w: qg.tensordot(x, w.T, 1), lambda x, w, c: x @ w.T),
    "tensordot of axes": (lambda x, w: qg.tensordot(x, w, [[1], [1]]), lambda x, w, c: x @ w.T),
    "tensordot reversed": (lambda x, w: qg.tensordot(w, x, [[-1], [1]]), lambda x, w, c: w @ x.T),
    "einsum": (lambda x, w: qg.einsum("mk,nk->mn", x, w), lambda x, w, c: x @ w.T),
    "einsum implicit": (lambda x, w: qg.einsum("mk,nk", x, w), lambda x, w, c: x @ w.T),
    "einsum reversed": (lambda x, w: qg.einsum("nk,mk->mn", w, x), lambda x, w, c: x @ w.T),
    "einsum transposed": (lambda x, w: qg.einsum("mk,nk->nm", x, w), lambda x, w, c: w @ x.T),
    "einsum with spaces": (lambda x, w: qg.einsum("m k, n k -> m n", x, w),
                           lambda x, w, c: x @ w.T),
}  # fmt: skip


@pytest.mark.parametrize("mode", FORMATS)
@pytest.mark.parametrize("name", SPELLINGS)
def test_case_3(name: str, mode: str) -> None:
    ours, theirs = SPELLINGS[name]
    weight = Weight(mode)
    plan = optimized(lambda x: ours(x, weight.dequantize(dtype=mx.float32)), X)
    assert "quantized_matmul" in ops(plan.graph)
    assert "dequantize" not in ops(plan.graph)
    expected = theirs(to_numpy(X).astype(np.float64), weight.dense, to_numpy(C).astype(np.float64))
    check(plan, [X], expected)


def test_case_3_einsum_with_more_axes() -> None:
    weight = Weight("affine")
    x = mx.random.normal((2, 3, K), key=KEY)
    plan = optimized(lambda x: qg.einsum("abk,nk->nab", x, weight.dequantize()), x)
    assert "quantized_matmul" in ops(plan.graph)
    check(plan, [x], np.einsum("abk,nk->nab", to_numpy(x).astype(np.float64), weight.dense))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w: qg.einsum("mk,mk->m", x, w[:5]),
        lambda x, w: qg.einsum("mk,nk->m", x, w),
        lambda x, w: qg.tensordot(x, w[:5], 2),
        lambda x, w: qg.einsum("mk,nk,mk->mn", x, w, x),
    ],
)
def test_case_3_near_misses(fn: Any) -> None:
    weight = Weight("affine")
    plan = optimized(lambda x: fn(x, weight.dequantize()), X)
    assert "quantized_matmul" not in ops(plan.graph)


# Case 4: the weight on the left.
@pytest.mark.parametrize("mode", FORMATS)
@pytest.mark.parametrize("shape", [(K,), (K, 7), (2, K, 7)])
def test_case_4(mode: str, shape: tuple[int, ...]) -> None:
    weight = Weight(mode)
    x = mx.random.normal(shape, key=KEY)
    plan = optimized(lambda x: weight.dequantize(dtype=mx.float32) @ x, x)
    assert "quantized_matmul" in ops(plan.graph)
    check(plan, [x], weight.dense @ to_numpy(x).astype(np.float64))


def test_case_4_two_weights() -> None:
    """The right one is packed, the left one is an activation like any other."""
    a, b = Weight("affine"), Weight("mxfp4")
    plan = optimized(lambda: a.dequantize() @ b.dequantize(dtype=mx.float32).T)
    assert sorted(ops(plan.graph)) == ["dequantize", "quantized_matmul"]
    check(plan, [], a.dense @ b.dense.T)


# Case 5: batches and experts.
@pytest.mark.parametrize("mode", FORMATS)
def test_case_5_batched_weights(mode: str) -> None:
    weight = Weight(mode, BATCH)
    x = mx.random.normal((3, 5, K), key=KEY)
    plan = optimized(lambda x: x @ weight.dequantize(dtype=mx.float32).swapaxes(1, 2), x)
    assert ops(plan.graph) == ["quantized_matmul"]
    check(plan, [x], to_numpy(x).astype(np.float64) @ weight.dense.swapaxes(1, 2))


def test_case_5_batches_in_another_order() -> None:
    w = mx.random.normal((2, 3, N, K), key=KEY)
    weight = Weight("affine", w)
    x = mx.random.normal((3, 2, 5, K), key=KEY)
    plan = optimized(lambda x: x @ weight.dequantize().transpose(1, 0, 3, 2), x)
    assert "quantized_matmul" in ops(plan.graph)
    check(plan, [x], to_numpy(x).astype(np.float64) @ weight.dense.transpose(1, 0, 3, 2))


@pytest.mark.parametrize("mode", FORMATS)
@pytest.mark.parametrize("sides", ["rhs", "lhs", "both"])
@pytest.mark.parametrize("sorted_indices", [False, True])
def test_case_5_gather_mm(mode: str, sides: str, sorted_indices: bool) -> None:
    weight = Weight(mode, BATCH)
    x = mx.random.normal((3, 5, K), key=KEY)
    lhs = mx.array([0, 1, 2, 2], mx.uint32) if sides != "rhs" else None
    rhs = mx.array([0, 1, 1, 2], mx.uint32) if sides != "lhs" else None
    if sides == "rhs":
        x = mx.random.normal((4, 5, K), key=KEY)
    if sides == "lhs":
        lhs = mx.array([2, 1, 0], mx.uint32)

    def fn(x: Any) -> Any:
        w = weight.dequantize(dtype=mx.float32).swapaxes(1, 2)
        return qg.gather_mm(x, w, lhs, rhs, sorted_indices=sorted_indices and sides == "rhs")

    plan = optimized(fn, x)
    assert ops(plan.graph) == ["gather_qmm"]
    left = to_numpy(x).astype(np.float64)
    left = left if lhs is None else left[to_numpy(lhs)]
    right = weight.dense if rhs is None else weight.dense[to_numpy(rhs)]
    check(plan, [x], left @ right.swapaxes(1, 2))


# Case 6: embeddings.
IDS = mx.array([[5, 0, 5], [95, 1, 2]])


@pytest.mark.parametrize("mode", FORMATS)
@pytest.mark.parametrize("how", ["take", "index"])
def test_case_6_embeddings(mode: str, how: str) -> None:
    weight = Weight(mode)

    def fn(ids: Any) -> Any:
        table = weight.dequantize()
        return qg.take(table, ids, axis=0) if how == "take" else table[ids]

    plan = optimized(fn, IDS)
    assert ops(plan.graph)[-1] == "dequantize"
    assert plan.graph.nodes[-1].output.shape == (2, 3, K)
    values = [qg.compile(g, passes=[])(IDS) for g in (plan.source, plan.graph)]
    assert mx.array_equal(*values)
    check(plan, [IDS], weight.dense[to_numpy(IDS)], 4e-3 if mode != "affine" else 1e-6)


def test_case_6_tied_embeddings() -> None:
    weight = Weight("affine")

    def fn(ids: Any) -> Any:
        h = qg.take(weight.dequantize(), ids, axis=0)
        return qg.tanh(h) @ weight.dequantize().T

    plan = optimized(fn, IDS)
    assert sorted(ops(plan.graph)) == [
        "dequantize", "quantized_matmul", "take", "take", "take", "tanh"
    ]  # fmt: skip
    shapes = [n.output.shape for n in plan.graph.nodes if n.op == "dequantize"]
    assert shapes == [(2, 3, K)]
    check(plan, [IDS], np.tanh(weight.dense[to_numpy(IDS)]) @ weight.dense.T)


def test_case_6_near_misses() -> None:
    weight = Weight("affine")
    columns = optimized(lambda ids: qg.take(weight.dequantize(), ids, axis=1), mx.array([1, 2]))
    assert ops(columns.graph) == ["dequantize", "take"]
    assert "groups run along the last axis" in reasons(columns)
    many = optimized(
        lambda ids: qg.take(weight.dequantize(), ids, axis=0), mx.zeros((200,), mx.int32)
    )
    assert ops(many.graph) == ["dequantize", "take"]
    assert "dequantizing all of them once is less work" in reasons(many)
    flat = optimized(lambda ids: qg.take(weight.dequantize(), ids), mx.array([1, 2]))
    assert ops(flat.graph) == ["dequantize", "take"]


# Case 7: several products, and something dense.
def test_case_7_several_products() -> None:
    weight = Weight("affine")

    def fn(x: Any) -> Any:
        w = weight.dequantize()
        return x @ w.T, (x * 2.0) @ w.T, w.sum(axis=1)

    plan = optimized(fn, X)
    assert sorted(ops(plan.graph)) == [
        "dequantize", "multiply", "quantized_matmul", "quantized_matmul", "sum"
    ]  # fmt: skip
    y = to_numpy(X).astype(np.float64) @ weight.dense.T
    check(plan, [X], [y, 2 * y, weight.dense.sum(axis=1)])


# Case 8: rows.
def test_case_8_slices_and_splits() -> None:
    weight = Weight("affine")

    def fn(x: Any) -> Any:
        q, k, v = qg.split(weight.dequantize(), 3, axis=0)
        return x @ q.T, x @ k.T, x @ v.T

    plan = optimized(fn, X)
    assert sorted(set(ops(plan.graph))) == ["quantized_matmul", "split"]
    y = to_numpy(X).astype(np.float64) @ weight.dense.T
    check(plan, [X], np.split(y, 3, axis=1))
    plan = optimized(lambda x: x @ weight.dequantize()[16:80].T, X)
    assert sorted(set(ops(plan.graph))) == ["getitem", "quantized_matmul"]
    check(plan, [X], y[:, 16:80])
    plan = optimized(lambda x: qg.split(x @ weight.dequantize().T, 3, axis=1), X)
    assert ops(plan.graph) == ["quantized_matmul", "split"]


@pytest.mark.parametrize("mode", FORMATS)
def test_case_8_concatenations(mode: str) -> None:
    a, b = Weight(mode), Weight(mode, W[:32] * 2)
    plan = optimized(lambda x: x @ qg.concatenate([a.dequantize(), b.dequantize()]).T, X)
    assert sorted(set(ops(plan.graph))) == ["concatenate", "quantized_matmul"]
    check(plan, [X], to_numpy(X).astype(np.float64) @ np.concatenate([a.dense, b.dense]).T)


def test_case_8_near_misses() -> None:
    a, b = Weight("affine"), Weight("mxfp4")
    both = optimized(lambda x: x @ qg.concatenate([a.dequantize(), b.dequantize()]).T, X)
    assert "quantized differently" in reasons(both)
    columns = optimized(lambda x: x @ qg.split(a.dequantize(), 2, axis=1)[0].T, X[:, :32])
    assert "groups run along the last axis" in reasons(columns)

    def shared(x: Any) -> Any:
        w = a.dequantize()
        return x @ w[:8].T, w

    assert "needed dense by something else" in reasons(optimized(shared, X))


# Case 9: fake quantization.
@pytest.mark.parametrize("mode", FORMATS)
def test_case_9_fake_quantization(mode: str) -> None:
    settings = FORMATS[mode]
    weight = Weight(mode)

    def fn(x: Any) -> Any:
        return x @ qg.dequantize(*qg.quantize(W, **settings), **settings).T

    plan = optimized(fn, X)
    assert sorted(ops(plan.graph)) == ["quantize", "quantized_matmul"]
    check(plan, [X], to_numpy(X).astype(np.float64) @ weight.dense.T)


def test_case_9_a_second_quantize_is_not_cancelled() -> None:
    weight = Weight("affine")

    def fn(x: Any) -> Any:
        again = qg.quantize(weight.dequantize(), group_size=64, bits=4)
        return qg.quantized_matmul(x, *again)

    plan = optimized(fn, X)
    assert ops(plan.graph) == ["dequantize", "quantize", "quantized_matmul"]


# Where the weight is, and loops around.
@pytest.mark.parametrize("mode", FORMATS)
@pytest.mark.parametrize("place", ["constant", "parameter", "carried"])
def test_weights_in_three_places_in_nested_loops(mode: str, place: str) -> None:
    square = Weight(mode, mx.random.normal((K, K), key=KEY) / 8)

    def loops(parts: Any, x: Any) -> Any:
        def inner(j: Any, carry: Any) -> Any:
            h, kept = carry
            w = square.dequantize(kept if place == "carried" else parts, dtype=mx.float32)
            return qg.tanh(h @ w.T), kept

        def outer(i: Any, carry: Any) -> Any:
            return qg.fori_loop(0, 2, inner, carry)

        return qg.fori_loop(0, 2, outer, (x, parts))[0]

    expected = to_numpy(X).astype(np.float64)
    for _ in range(4):
        expected = np.tanh(expected @ square.dense.T)
    parts = list(square.parts)
    if place == "constant":
        plan = optimized(lambda x: loops(parts, x), X)
        args = [X]
    else:
        graph = qg.trace(loops, parts, X, parameters=[0] if place == "parameter" else [])
        plan = qg.optimize(graph, passes=[*PASSES, HoistQuantize()])
        args = [parts, X]
    assert "quantized_matmul" in ops(plan.graph)
    assert not {"matmul", "dequantize"} & set(ops(plan.graph))
    check(plan, args, expected, 1e-5)


def test_the_ledger_names_case_line_and_weight() -> None:
    weight = Weight("affine")
    packed = weight.parts[0]

    def fn(x: Any) -> Any:
        return x @ qg.dequantize(packed, *weight.parts[1:], **weight.settings).T

    entry, _ = optimized(fn, X).ledger()
    assert (entry.decision, entry.case, entry.name) == ("fused", 1, "packed")
    assert str(entry.origin).startswith("test_fuse_quantized_matmul.py:")
    assert "f32[96,64]" in entry.what


@pytest.mark.parametrize("mode", FORMATS)
def test_case_3_scaled_products(mode: str) -> None:
    weight = Weight(mode)
    plan = optimized(lambda x: (x * 0.5) @ weight.dequantize().T * 3, X)
    assert "quantized_matmul" in ops(plan.graph)
    assert "dequantize" not in ops(plan.graph)
    check(plan, [X], 1.5 * to_numpy(X).astype(np.float64) @ weight.dense.T)


def test_case_3_a_scaled_weight_is_refused_in_words() -> None:
    weight = Weight("affine")
    plan = optimized(lambda x: x @ (weight.dequantize() * 2).T, X)
    assert "dequantize" in ops(plan.graph)
    assert "scale x, the result or the packed scales instead" in reasons(plan)
    plan = optimized(lambda: (weight.dequantize() * 2) @ weight.dequantize().T)
    assert "quantized_matmul" in ops(plan.graph)
    assert reasons(plan) == ""
