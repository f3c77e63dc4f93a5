"""`choose-attention`: a mask that hides the end of a cache becomes a position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qgraph as qg
from qgraph.kernels.attention.decode_attention import LEAST_WORK
from qgraph.passes import ChooseAttention, EliminateDeadCode, FoldConstants
from qgraph.target import Target
from tests.support.arrays import to_numpy
from tests.support.compiler import needs_compiler

LENGTH, DIM = 12, 64
Q = mx.random.normal((2, 4, 1, DIM), key=mx.random.key(0))
K, V = (mx.random.normal((2, 2, LENGTH, DIM), key=mx.random.key(i)) for i in (1, 2))
CPU = Target(mx.Device(mx.cpu, 0), "cpu", "x86_64", 2)
PASSES = [FoldConstants(), ChooseAttention(everywhere=True), EliminateDeadCode()]

MASKS: dict[str, Callable[[Any], Any]] = {
    "arange <= last": lambda last: qg.arange(LENGTH) <= last,
    "last >= arange": lambda last: last >= qg.arange(LENGTH),
    "rows and columns": lambda last: qg.arange(LENGTH)[None] <= qg.arange(1)[:, None] + last,
    "four axes": lambda last: (qg.arange(LENGTH) <= last).reshape(1, 1, 1, LENGTH),
    "expanded": lambda last: qg.expand_dims(qg.arange(0, LENGTH, 1) <= last, 0),
}
OTHERS: dict[str, Callable[[Any], Any]] = {
    "every other": lambda last: qg.arange(LENGTH) % 2 <= last,
    "float": lambda last: qg.arange(LENGTH).astype(mx.float32) <= last + 0.5,
    "a limit each": lambda last: qg.arange(LENGTH) <= qg.arange(LENGTH) + last,
    "transposed batches": lambda last: qg.arange(2)[:, None, None, None] <= last,
}


def attend(mask: Callable[[Any], Any], scale: float = 0.125, **options: Any) -> Any:
    return lambda q, k, v, last: qg.fast.scaled_dot_product_attention(
        q, k, v, scale=scale, mask=mask(last), **options
    )


def plan(fn: Any, q: mx.array = Q) -> qg.Plan:
    graph = qg.trace(fn, q, K, V, mx.array(5), name="f")
    return qg.optimize(graph, passes=PASSES, target="cpu")


@pytest.mark.parametrize("spelling", MASKS)
@pytest.mark.parametrize("last", [0, 5, LENGTH - 1])
def test_spellings(spelling: str, last: int) -> None:
    made = plan(attend(MASKS[spelling]))
    ops = {n.op for n in made.graph.nodes}
    assert "decode_attention" in ops
    assert ops.isdisjoint({"less_equal", "greater_equal", "fast.scaled_dot_product_attention"})
    y = qg.compile(made.graph, passes=[], target="cpu")(Q, K, V, mx.array(last))
    q, k, v = (to_numpy(a).astype(np.float64) for a in (Q, K, V))
    k, v = (np.repeat(a[:, :, : last + 1], 2, axis=1) for a in (k, v))
    scores = 0.125 * q @ k.swapaxes(-1, -2)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(to_numpy(y), p / p.sum(-1, keepdims=True) @ v, rtol=1e-4, atol=1e-5)


def test_text() -> None:
    made = plan(attend(MASKS["arange <= last"]))
    assert made.graph.format(origins=False) == "\n".join(
        [
            f"graph f(q: f32[2,4,1,{DIM}], k: f32[2,2,12,{DIM}], v: f32[2,2,12,{DIM}], last: i32[])"
            f" -> f32[2,4,1,{DIM}]",
            f"  %0: f32[2,4,1,{DIM}] = decode_attention(q, k, v, last) {{scale=0.125}}",
            "  return %0",
        ]
    )


def test_in_a_loop() -> None:
    def fn(q: Any, k: Any, v: Any, last: Any) -> Any:
        body = lambda i, h: attend(MASKS["rows and columns"])(h, k, v, last + i)  # noqa: E731
        return qg.fori_loop(0, 3, body, q)

    made = plan(fn)
    assert "decode_attention" in {n.op for _, n in made.graph.walk()}
    y = qg.compile(made.graph, passes=[], target="cpu")(Q, K, V, mx.array(5))
    np.testing.assert_allclose(y, fn(Q, K, V, mx.array(5)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", OTHERS)
def test_other_masks_stay_masks(mask: str) -> None:
    fn = attend(OTHERS[mask])
    made = plan(fn)
    (node,) = [n for n in made.graph.nodes if n.op == "decode_attention"]
    assert node.value("mask") is not None
    graph = qg.trace(fn, Q, K, V, mx.array(5))
    assert ChooseAttention(CPU)(graph) is graph
    y = qg.compile(made.graph, passes=[], target="cpu")(Q, K, V, mx.array(5))
    np.testing.assert_allclose(y, fn(Q, K, V, mx.array(5)), rtol=1e-4, atol=1e-5)


def added(truths: Any, shown: float = 0.0, hidden: float = -np.inf) -> Any:
    """As MLX makes it before its kernels on CUDA."""
    whole = (2, 4, 1, LENGTH)
    zeros, nothing = (qg.broadcast_to(qg.full((), x, mx.float32), whole) for x in (shown, hidden))
    return qg.where(qg.broadcast_to(truths, whole), zeros, nothing)


def test_zeros_and_infinities_are_truths_on_cuda() -> None:
    def fn(q: Any, k: Any, v: Any, last: Any) -> Any:
        seen = (qg.arange(LENGTH) <= last) & (padding(last) <= qg.arange(LENGTH))
        return attend(lambda _: added(seen))(q, k, v, last)

    made = plan(fn)
    (node,) = [n for n in made.graph.nodes if n.op == "decode_attention"]
    assert node.value("mask") is None
    assert node.value("first") is not None
    assert "where" not in {n.op for n in made.graph.nodes}
    y = qg.compile(made.graph, passes=[], target="cpu")(Q, K, V, mx.array(5))
    np.testing.assert_allclose(y, fn(Q, K, V, mx.array(5)), rtol=1e-4, atol=1e-5)
    graph = qg.trace(fn, Q, K, V, mx.array(5))
    assert ChooseAttention(CPU)(graph) is graph


@pytest.mark.parametrize(("shown", "hidden"), [(0.0, -1e9), (1.0, -np.inf), (-np.inf, 0.0)])
def test_other_numbers_stay_numbers(shown: float, hidden: float) -> None:
    """Near misses of 4."""
    fn = attend(lambda last: added(qg.arange(LENGTH) <= last, shown, hidden))
    (node,) = [n for n in plan(fn).graph.nodes if n.op == "decode_attention"]
    mask = node.value("mask")
    assert mask is not None
    assert mask.dtype == mx.float32


def padding(last: Any) -> Any:
    """Of each row of the batch."""
    return qg.minimum(last, mx.array([2, 4]).reshape(2, 1, 1, 1))


def rows(last: Any, count: int) -> Any:
    """Positions of queries of which the last stands at `last`."""
    return (last - (count - 1) + qg.arange(count))[:, None]


columns = mx.arange(LENGTH)


def window(last: Any, count: int, size: int) -> Any:
    at = rows(last, count)
    return (columns <= at) & (at < columns + size)


LIMITS: dict[str, tuple[int, Callable[[Any], Any], dict[str, Any]]] = {
    "strictly before": (1, lambda last: columns < last, {}),
    "first keys hidden": (1, lambda last: columns >= last, {"first": True, "open": True}),
    "a window": (1, lambda last: window(last, 1, 3), {"window": 3}),
    "padding": (1, lambda last: (columns <= last) & (padding(last) <= columns), {"first": True}),
    "padding, strictly": (
        1, lambda last: (padding(last) < columns) & (last >= columns), {"first": True},
    ),
    "queries": (3, lambda last: rows(last, 3) >= columns, {}),
    "queries, window, padding": (
        3, lambda last: window(last, 3, 4) & (padding(last) <= columns),
        {"window": 4, "first": True},
    ),
    "and something more": (
        1, lambda last: (columns <= last) & (columns % 2 == last % 2), {"mask": True},
    ),
    "for all queries alike": (3, lambda last: columns <= last, {"mask": True, "open": True}),
    "rows apart": (3, lambda last: columns <= rows(last, 3) * 1, {"mask": True, "open": True}),
    "two ends": (1, lambda last: (columns <= last) & (columns <= last - 2), {"mask": True}),
    "additive": (
        1, lambda last: qg.where(columns <= last, 0.0, -3.0), {"mask": True, "open": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LIMITS)
def test_limits(case: str) -> None:
    queries, mask, wanted = LIMITS[case]
    q = mx.random.normal((2, 4, queries, DIM), key=mx.random.key(7))
    fn = attend(mask)
    made = plan(fn, q)
    (node,) = [n for n in made.graph.nodes if n.op == "decode_attention"]
    found = {name for name in ("first", "window", "mask") if node.args.get(name)}
    assert found == set(wanted) - {"open"}
    assert node.args.get("window", 0) == wanted.get("window", 0)
    assert (node.operand("last").node.op == "constant") == ("open" in wanted)
    program = qg.compile(made.graph, passes=[], target="cpu")
    for last in (5, 8, LENGTH - 1):
        given = (q, K, V, mx.array(last))
        np.testing.assert_allclose(program(*given), fn(*given), rtol=1e-4, atol=1e-5)


def test_sinks() -> None:
    fn = attend(MASKS["arange <= last"], sinks=mx.array([0.5, -1.0, 2.0, 0.0]))
    made = plan(fn)
    assert "decode_attention" in {n.op for n in made.graph.nodes}
    y = qg.compile(made.graph, passes=[], target="cpu")(Q, K, V, mx.array(5))
    np.testing.assert_allclose(y, fn(Q, K, V, mx.array(5)), rtol=1e-4, atol=1e-5)


def test_near_misses() -> None:
    good = MASKS["arange <= last"]
    many = mx.random.normal((2, 4, 17, DIM))
    refused = [e.reason for e in plan(attend(good), many).ledger() if e.decision == "refused"]
    assert refused == ["the mask stays: there are 17 queries a head; the kernel takes 16"]
    odd = qg.trace(attend(good), *(a[..., :32] for a in (Q, K, V)), mx.array(5))
    assert ChooseAttention(everywhere=True)(odd) is odd
    streamed = qg.trace(attend(good, stream="cpu"), Q, K, V, mx.array(5))
    assert ChooseAttention(everywhere=True)(streamed) is streamed
    cpu = qg.trace(attend(good), Q, K, V, mx.array(5))
    assert ChooseAttention()(cpu) is cpu


def test_numbers_that_wrap_around_do_not_count_up() -> None:
    x = mx.random.normal((1, 1, 300, DIM))

    def fn(q: Any, k: Any, last: Any) -> Any:
        mask = qg.arange(300, dtype=mx.int8) <= last
        return qg.fast.scaled_dot_product_attention(q, k, k, scale=0.125, mask=mask)

    graph = qg.trace(fn, x[:, :, :1], x, mx.array(50))
    (node,) = [n for n in ChooseAttention(everywhere=True)(graph).nodes if "attention" in n.op]
    assert node.value("mask") is not None


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (1, 4, 1, 1)])
def test_masks_of_batches_or_heads_as_many_as_keys(shape: tuple[int, ...]) -> None:
    q, k = (mx.random.normal((4, 4, n, DIM), key=mx.random.key(n)) for n in (1, 4))

    def fn(q: Any, k: Any, last: Any) -> Any:
        mask = (qg.arange(4) <= last).reshape(*shape)
        return qg.fast.scaled_dot_product_attention(q, k, k, scale=0.125, mask=mask)

    graph = qg.trace(fn, q, k, mx.array(2))
    made = qg.optimize(graph, passes=PASSES, target="cpu").graph
    (node,) = [n for n in made.nodes if n.op == "decode_attention"]
    assert node.value("mask") is not None


LONG = LEAST_WORK // (2 * 4 * DIM) + 1


def operands(length: int = LONG, dim: int = DIM, dtype: mx.Dtype = mx.float32) -> list[mx.array]:
    q = mx.random.normal((2, 4, 1, dim), dtype, key=mx.random.key(0))
    shape = (2, 2, length, dim)
    return [q, *(mx.random.normal(shape, dtype, key=mx.random.key(i)) for i in (1, 2))]


def on_cpu(length: int, given: list[mx.array]) -> qg.Plan:
    fn = attend(lambda last: qg.arange(length) <= last)
    passes = [FoldConstants(), ChooseAttention(CPU), EliminateDeadCode()]
    return qg.optimize(qg.trace(fn, *given, mx.array(5)), passes=passes, target="cpu")


@needs_compiler
@pytest.mark.parametrize("last", [0, 5, LONG - 1, LONG + 7])
def test_on_cpus_it_runs_from_the_host(last: int) -> None:
    given = operands()
    made = on_cpu(LONG, given)
    (node,) = [n for n in made.graph.nodes if n.op == "decode_attention"]
    assert (node.kernel, node.args["cores"]) == ("host-attention", 2)
    y = qg.compile(made.graph, passes=[], target="cpu")(*given, mx.array(last))
    q, k, v = (to_numpy(a).astype(np.float64) for a in given)
    k, v = (np.repeat(a[:, :, : last + 1], 2, axis=1) for a in (k, v))
    scores = 0.125 * q @ k.swapaxes(-1, -2)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(y, p / p.sum(-1, keepdims=True) @ v, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("dim", [DIM, 40])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_on_cpus_in_half_precision(dim: int, dtype: mx.Dtype) -> None:
    given = operands(2 * LONG, dim, dtype)
    made = on_cpu(2 * LONG, given)
    assert "decode_attention" in {n.op for n in made.graph.nodes}
    y = qg.compile(made.graph, passes=[], target="cpu")(*given, mx.array(50))
    q, k, v = (to_numpy(a).astype(np.float64) for a in given)
    k, v = (np.repeat(a[:, :, :51], 2, axis=1) for a in (k, v))
    scores = 0.125 * q @ k.swapaxes(-1, -2)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    assert y.dtype == dtype
    want = p / p.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(to_numpy(y), want, atol=8e-3 if dtype == mx.bfloat16 else 1e-3)


@needs_compiler
def test_near_misses_on_cpus() -> None:
    made = on_cpu(LONG - 1, operands(LONG - 1))
    assert "decode_attention" not in {n.op for n in made.graph.nodes}
    (entry,) = [e for e in made.ledger() if e.made_by == "choose-attention"]
    assert "too small" in entry.reason


def test_metal_keeps_its_masks() -> None:
    graph = qg.trace(attend(MASKS["arange <= last"]), Q, K, V, mx.array(5))
    assert ChooseAttention(Target(mx.Device(mx.cpu, 0), "metal", "m", 8))(graph) is graph


@pytest.mark.parametrize("mask", [True, False, 0.5])
def test_a_mask_without_axes(mask: Any) -> None:
    q = mx.random.normal((1, 2, 1, 64), key=mx.random.key(3))
    k = mx.random.normal((1, 2, 512, 64), key=mx.random.key(4))

    def fn(q: Any, k: Any) -> Any:
        return qg.fast.scaled_dot_product_attention(q, k, k, scale=0.1, mask=mx.array(mask))

    y = qg.compile(fn, q, k, target="cpu")(q, k)
    assert mx.allclose(y, fn(q, k), atol=1e-6, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("with_regions", [True, False])
def test_windows_and_padding_on_cpus(with_regions: bool) -> None:
    """From the host, and as a step of a region."""

    def fn(q: Any, k: Any, v: Any, last: Any) -> Any:
        at = qg.arange(LONG)
        mask = (at <= last) & (last < at + 20) & (padding(last) + 35 <= at)
        return qg.fast.scaled_dot_product_attention(q + 0, k, v, scale=0.125, mask=mask)

    given = operands()
    passes = [p for p in qg.default_passes(CPU) if with_regions or p.name != "form-regions"]
    passes = [replace(p, everywhere=True) if p.name == "form-regions" else p for p in passes]
    graph = qg.trace(fn, *given, mx.array(50))
    program = qg.compile(graph, passes=passes, target="cpu")
    ops = [n.op for _, n in program.plan.graph.walk()]
    assert ("region" in ops) == with_regions
    (node,) = [n for _, n in program.plan.graph.walk() if n.op == "decode_attention"]
    assert (node.args["window"], node.value("first") is not None) == (20, True)
    for last in (40, 50, LONG - 1):
        want = fn(*given, mx.array(last))
        np.testing.assert_allclose(program(*given, mx.array(last)), want, rtol=1e-4, atol=1e-5)
