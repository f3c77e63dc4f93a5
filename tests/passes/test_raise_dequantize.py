"""`raise-dequantize` (case 10 of fusion): what an import on a CPU expands is one op again."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import qgraph as qg
from qgraph.ir import Graph
from qgraph.passes import EliminateDeadCode, RaiseDequantize
from tests.support import reference
from tests.support.arrays import to_numpy

W = mx.random.normal((96, 128), key=mx.random.key(0))
X = mx.random.normal((2, 128), key=mx.random.key(1))


def ops(graph: Graph) -> list[str]:
    return [n.op for _, n in graph.walk() if n.op != "constant"]


def raised(graph: Graph) -> Graph:
    return qg.optimize(graph, passes=[RaiseDequantize(), EliminateDeadCode()], target="cpu").graph


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_affine_format(bits: int, group: int, dtype: mx.Dtype) -> None:
    parts = mx.quantize(W.astype(dtype), group, bits)
    mx.eval(parts)
    x = X.astype(dtype)
    graph = qg.from_mlx(lambda x: x @ mx.dequantize(*parts, group, bits).T, x)
    assert len(ops(graph)) > 20
    after = raised(graph)
    assert ops(after) == ["dequantize", "transpose", "matmul"]
    before, now = (qg.compile(g, passes=[], target="cpu")(x) for g in (graph, after))
    assert mx.array_equal(before, now)
    plan = qg.optimize(graph, target="cpu")
    assert not {"dequantize", "matmul"} & set(ops(plan.graph))
    w, s, b = (to_numpy(p) for p in parts)
    dense = reference.dequantize(w, s, b, group, bits, "affine")
    expected = to_numpy(x).astype(np.float64) @ dense.T
    tolerance = {mx.float32: 2e-6, mx.float16: 2e-3}.get(dtype, 2e-2)
    result = qg.compile(graph, target="cpu")(x)
    assert reference.relative_error(to_numpy(result), expected) < tolerance


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_mxfp4(dtype: mx.Dtype) -> None:
    settings = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    parts = mx.quantize(W, **settings)
    mx.eval(parts)
    graph = qg.from_mlx(lambda: mx.dequantize(*parts, **settings, dtype=dtype))
    assert len(ops(graph)) > 15
    after = raised(graph)
    assert ops(after) == ["dequantize"]
    before, now = (qg.compile(g, passes=[], target="cpu")() for g in (graph, after))
    assert now.dtype == dtype
    assert mx.array_equal(before, now)


@pytest.mark.parametrize(("mode", "group", "bits"), [("mxfp8", 32, 8), ("nvfp4", 16, 4)])
def test_other_modes_arrive_whole(mode: str, group: int, bits: int) -> None:
    """MLX hands over no part of them, so the importer carries the op itself through."""
    parts = mx.quantize(W, group, bits, mode=mode)
    mx.eval(parts)
    graph = qg.from_mlx(
        lambda *p: mx.dequantize(*p, group_size=group, bits=bits, mode=mode), *parts
    )
    assert ops(graph) == ["dequantize"]


def test_text() -> None:
    w, s, b = mx.quantize(W)
    mx.eval(w, s, b)
    graph = qg.from_mlx(lambda w, s, b: mx.dequantize(w, s, b), w, s, b, name="f")
    assert raised(graph).format(origins=False) == (
        "graph f(w: u32[96,16], s: f32[96,2], b: f32[96,2]) -> f32[96,128]\n"
        "  %0: f32[96,128] = dequantize(w, s, b) {bits=4, group_size=64}\n"
        "  return %0"
    )


def test_in_a_nested_loop_and_through_a_module() -> None:
    layer = nn.QuantizedEmbedding(32, 64, group_size=32)
    mx.eval(layer.parameters())

    def fn(ids: Any) -> Any:
        def inner(j: Any, h: Any) -> Any:
            return h + qg.call(layer, ids)

        start = qg.zeros((2, 64))
        return qg.fori_loop(0, 2, lambda i, h: qg.fori_loop(0, 2, inner, h), start)

    ids = mx.array([3, 5])
    graph = qg.trace(fn, ids)
    after = raised(graph)
    assert ops(after).count("dequantize") == 1
    assert "right_shift" not in ops(after)
    assert mx.allclose(qg.compile(after, passes=[], target="cpu")(ids), 4 * layer(ids), rtol=1e-6)


def test_the_ledger_says_so() -> None:
    parts = mx.quantize(W)
    mx.eval(parts)
    plan = qg.optimize(qg.from_mlx(lambda x: x @ mx.dequantize(*parts).T, X), target="cpu")
    entry = next(e for e in plan.ledger() if e.made_by == "raise-dequantize")
    assert entry.case == 10


def test_near_misses() -> None:
    w, s, b = mx.quantize(W)
    mx.eval(w, s, b)

    def by_hand(x: Any, shift: int) -> Any:
        """4 bits unpacked by hand; in order it is what dequantize means, but not its expansion."""
        shifts = mx.arange(0, 32, 4, dtype=mx.uint32) + shift
        codes = (w[..., None] >> shifts) & 15
        dense = codes.reshape(96, 2, 64).astype(mx.float32) * s[..., None] + b[..., None]
        return x @ dense.reshape(96, 128).T

    for shift in (0, 1):
        graph = qg.from_mlx(lambda x, n=shift: by_hand(x, n), X)
        assert RaiseDequantize()(graph) is graph
    scaled = qg.from_mlx(lambda x: x @ mx.dequantize(w, s, b * 2.0).T, X)
    assert ops(raised(scaled)).count("dequantize") == 1
    plain = qg.trace(lambda x: qg.tanh(x), X)
    assert RaiseDequantize()(plain) is plain
