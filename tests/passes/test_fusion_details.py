"""`fuse-quantized-matmul` and `sink-dequantize`: what the table of cases leaves out.

More spellings, shapes and dtypes, and what the ledger says; numbers against NumPy in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from tests.support import reference
from tests.support.arrays import to_numpy
from tests.support.fusion import COARSE, K, N, Weight, check, ops, optimized, random, wide

MODES = ("affine-4-32", "mxfp4", "mxfp8", "nvfp4")
W, X = random(N, K, seed=3), random(5, K, seed=4)
DTYPES = [mx.float32, mx.float16, mx.bfloat16]

VIEWS: dict[str, Callable[[Any], Any]] = {
    "negative axes": lambda w: qg.transpose(w, (-1, -2)),
    "twice more": lambda w: w.T.T.T,
    "reshape transposed": lambda w: w.reshape(1, N, K).swapaxes(1, 2).reshape(K, N),
    "index of None": lambda w: w[None, :, :].squeeze(0).T,
    "flatten": lambda w: w.reshape(8, 12, K).flatten(0, 1).T,
    "unflatten": lambda w: qg.unflatten(w, 0, (8, 12)).reshape(N, K).T,
    "stop_gradient": lambda w: qg.stop_gradient(w).T,
    "mT": lambda w: w.mT,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("view", VIEWS)
def test_more_views(mode: str, view: str) -> None:
    weight = Weight(mode, W)
    plan = optimized(lambda x: x @ VIEWS[view](weight.dequantize(dtype=mx.float32)), X)
    assert ops(plan.graph) == ["quantized_matmul"]
    check(plan, [X], wide(X) @ weight.dense.T)


@pytest.mark.parametrize("shape", [(K,), (2, 5, K), (1, 2, 3, K)])
def test_shapes_of_x(shape: tuple[int, ...]) -> None:
    weight, x = Weight("affine-4-32", W), random(*shape)
    plan = optimized(lambda x: x @ weight.dequantize().T, x)
    assert ops(plan.graph) == ["quantized_matmul"]
    check(plan, [x], wide(x) @ weight.dense.T)


def test_a_broadcast_batch_needs_no_copies() -> None:
    weight = Weight("affine-4-32", W)
    plan = optimized(lambda x: x @ qg.broadcast_to(weight.dequantize().T, (7, K, N)), X)
    assert ops(plan.graph) == ["quantized_matmul", "broadcast_to"]
    check(plan, [X], np.broadcast_to(wide(X) @ weight.dense.T, (7, 5, N)))


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("w_dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_dtypes(mode: str, w_dtype: mx.Dtype, x_dtype: mx.Dtype) -> None:
    weight = Weight(mode, W, w_dtype)
    x = X.astype(x_dtype)
    plan = optimized(lambda x: x @ weight.dequantize(dtype=w_dtype).T, x)
    assert "matmul" not in ops(plan.graph)
    check(plan, [x], wide(x) @ weight.dense.T, max(COARSE[x_dtype], COARSE[w_dtype]))


def test_never_less_exact_than_as_written() -> None:
    """Scales of float32 under a float16 product: it runs in float32, not on rounded scales."""
    weight, x = Weight("affine-4-32", W), X.astype(mx.float16)
    plan = optimized(lambda x: x @ weight.dequantize().astype(mx.float16).T, x)
    expected = wide(x) @ weight.dense.T
    errors = [
        reference.relative_error(to_numpy(qg.compile(g, passes=[])(x)), expected)
        for g in (plan.source, plan.graph)
    ]
    assert errors[1] <= errors[0]


SPELLINGS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "inner reversed": (lambda x, w: qg.inner(w, x), lambda x, w: w @ x.T),
    "tensordot": (lambda x, w: qg.tensordot(x, w.T, 1), lambda x, w: x @ w.T),
    "tensordot reversed": (lambda x, w: qg.tensordot(w, x, [[-1], [1]]), lambda x, w: w @ x.T),
    "einsum implicit": (lambda x, w: qg.einsum("mk,nk", x, w), lambda x, w: x @ w.T),
    "einsum reversed": (lambda x, w: qg.einsum("nk,mk->mn", w, x), lambda x, w: x @ w.T),
    "einsum transposed": (lambda x, w: qg.einsum("mk,nk->nm", x, w), lambda x, w: w @ x.T),
    "einsum with spaces": (
        lambda x, w: qg.einsum("m k, n k -> m n", x, w), lambda x, w: x @ w.T
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SPELLINGS)
def test_more_spellings(name: str, mode: str) -> None:
    ours, theirs = SPELLINGS[name]
    weight = Weight(mode, W)
    plan = optimized(lambda x: ours(x, weight.dequantize(dtype=mx.float32)), X)
    assert "quantized_matmul" in ops(plan.graph)
    assert "dequantize" not in ops(plan.graph)
    check(plan, [X], theirs(wide(X), weight.dense))


H, D = 4, K // 4
SUMS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "axes of x in front": ("abk,nk->nab", (2, 3, K), (N, K)),
    "heads of the result": ("bsk,hdk->bshd", (2, 3, K), (H, N // H, K)),
    "heads in another order": ("bsk,hdk->bhsd", (2, 3, K), (H, N // H, K)),
    "heads summed": ("bshd,nhd->bsn", (2, 3, H, D), (N, H, D)),
    "groups along the result": ("bn,nk->bk", (2, N), (N, K)),
    "a batch": ("ebk,enk->ebn", (H, 3, K), (H, N // H, K)),
    "a batch in the middle": ("bek,enk->ben", (3, H, K), (H, N // H, K)),
    "a batch of vectors": ("ek,enk->en", (H, K), (H, N // H, K)),
    "a vector": ("k,nk->n", (K,), (N, K)),
    "dots": ("...k,nk->...n", (2, 3, K), (N, K)),
    "dots and no arrow": ("...k,nk", (2, 3, K), (N, K)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SUMS)
def test_einsum(name: str, mode: str) -> None:
    spelt, x_shape, w_shape = SUMS[name]
    weight, x = Weight(mode, W), random(*x_shape)
    plan = optimized(
        lambda x: qg.einsum(spelt, x, weight.dequantize(dtype=mx.float32).reshape(w_shape)), x
    )
    assert "quantized_matmul" in ops(plan.graph)
    assert not {"dequantize", "einsum"} & set(ops(plan.graph))
    check(plan, [x], np.einsum(spelt, wide(x), weight.dense.reshape(w_shape)))


def test_tensordot_of_two_axes() -> None:
    weight, x = Weight("affine-4-32", W), random(3, H, D)
    plan = optimized(
        lambda x: qg.tensordot(x, weight.dequantize().reshape(N, H, D), [[2, 1], [2, 1]]), x
    )
    assert "quantized_matmul" in ops(plan.graph)
    check(plan, [x], wide(x).reshape(3, K) @ weight.dense.T)


def test_batches_on_both_sides_of_a_weight_on_the_left() -> None:
    weight, x = Weight("affine-4-32", W), random(2, K, 7)
    plan = optimized(lambda x: weight.dequantize() @ x, x)
    assert "quantized_matmul" in ops(plan.graph)
    check(plan, [x], weight.dense @ wide(x))


def test_two_weights() -> None:
    """The right one is packed, the left one is an activation like any other."""
    a, b = Weight("affine-4-32", W), Weight("mxfp4", W)
    plan = optimized(lambda: a.dequantize() @ b.dequantize(dtype=mx.float32).T)
    assert sorted(ops(plan.graph)) == ["dequantize", "quantized_matmul"]
    check(plan, [], a.dense @ b.dense.T)


def test_batches_in_another_order() -> None:
    weight, x = Weight("affine-4-32", random(2, 3, N, K)), random(3, 2, 5, K)
    plan = optimized(lambda x: x @ weight.dequantize().transpose(1, 0, 3, 2), x)
    assert "quantized_matmul" in ops(plan.graph)
    check(plan, [x], wide(x) @ weight.dense.transpose(1, 0, 3, 2))


def test_rows_of_an_embedding_are_no_weight_on_the_left() -> None:
    """They are what is multiplied; on the right, as candidates of a softmax, they are a weight."""
    weight, head, ids = Weight("affine-4-32", W), random(K, 7), mx.array([3, 5])
    plan = optimized(lambda i: weight.dequantize()[i] @ head, ids)
    assert ops(plan.graph).count("matmul") == 1
    rows = weight.dense[[3, 5]]
    check(plan, [ids], rows @ wide(head))
    plan = optimized(lambda x, i: x @ weight.dequantize()[i].T, X, ids)
    assert "quantized_matmul" in ops(plan.graph)
    check(plan, [X, ids], wide(X) @ rows.T)


def test_look_ups_are_bit_for_bit() -> None:
    for mode in MODES:
        weight, ids = Weight(mode, W), mx.array([[5, 0], [95, 1]])
        plan = optimized(lambda i, w=weight: qg.take(w.dequantize(), i, axis=0), ids)
        values = [qg.compile(g, passes=[])(ids) for g in (plan.source, plan.graph)]
        assert mx.array_equal(*values)


def test_nested_loops_around_a_weight() -> None:
    square = Weight("nvfp4", random(K, K) / 8)

    def fn(parts: Any, x: Any) -> Any:
        def inner(j: Any, h: Any) -> Any:
            return qg.tanh(h @ square.dequantize(parts, dtype=mx.float32).T)

        return qg.fori_loop(0, 2, lambda i, h: qg.fori_loop(0, 2, inner, h), x)

    plan = optimized(fn, square.parts, X, parameters=[0])
    assert not {"matmul", "dequantize"} & set(ops(plan.graph))
    expected = wide(X)
    for _ in range(4):
        expected = np.tanh(expected @ square.dense.T)
    check(plan, [list(square.parts), X], expected, 1e-5)


def test_the_ledger_names_case_line_and_weight() -> None:
    weight = Weight("affine-4-32", W)
    packed = weight.parts[0]

    def fn(x: Any) -> Any:
        return x @ qg.dequantize(packed, *weight.parts[1:], **weight.settings).T

    entry, _ = optimized(fn, X).ledger()
    assert (entry.decision, entry.case, entry.name) == ("fused", 1, "packed")
    assert str(entry.origin).startswith("test_fusion_details.py:")
    assert f"f32[{N},{K}]" in entry.what


def test_long_chains_before_a_product() -> None:
    """Looking behind an operand goes through views and factors, not through all of a network."""
    weight = Weight("affine-4-32", W)

    def fn(x: Any) -> Any:
        h = x
        for _ in range(1500):
            h = (h + x) * 0.5
        return h @ weight.dequantize().T + h @ h.T @ h @ weight.dequantize().T

    plan = optimized(fn, X)
    assert ops(plan.graph).count("quantized_matmul") == 2


def test_empty_products_are_left_dense() -> None:
    """MLX 0.32 ends the process for an empty quantized product; dense ones are fine."""
    parts = mx.quantize(mx.random.normal((64, 64)))
    x = mx.zeros((0, 64))
    program = qg.compile(lambda x: x @ qg.dequantize(*parts).T, x, target="cpu")
    assert program(x).shape == (0, 64)
    assert "quantized_matmul" not in {n.op for _, n in program.plan.graph.walk()}
    reasons = [e.reason for e in program.plan.ledger() if e.decision == "refused"]
    assert reasons == ["not fused: the product is empty; MLX's quantized products are not"]
