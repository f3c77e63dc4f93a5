"""Stacks of weights, quantized in a loop over the layers: once, whole, and bit for bit the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

import qgraph as qg
from qgraph.analysis.verify import verify
from qgraph.passes import EliminateDeadCode, FuseQuantizedMatmul, HoistQuantize
from qgraph.passes.shared.stacks import quantize_whole
from tests.support.fusion import FORMATS, not_compiled, random

LAYERS = 3
STACK, X = random(LAYERS, 128, 128) / 11, random(2, 128, seed=1)
PASSES = [FuseQuantizedMatmul(), HoistQuantize(), EliminateDeadCode()]

Settings = dict[str, Any]


def step(h: Any, w: Any, settings: Settings) -> Any:
    return qg.tanh(qg.quantized_matmul(h, w, **settings))


def _nested(x: Any, stack: Any, s: Settings) -> Any:
    def layer(h: Any, w: Any) -> Any:
        return qg.fori_loop(0, 2, lambda j, h: step(h, w, s), h), h.sum()

    return qg.fori_loop(0, 2, lambda i, h: qg.scan(layer, h, stack)[0], x)


def _fake(x: Any, stack: Any, s: Settings) -> Any:
    def layer(h: Any, w: Any) -> Any:
        dense = qg.dequantize(*qg.quantize(w, **s), **s, dtype=mx.float32)
        return qg.tanh(h @ dense.T), w[0]

    return qg.scan(layer, x, stack)


LOOPS: dict[str, Callable[[Any, Any, Settings], Any]] = {
    "scan": lambda x, w, s: qg.scan(lambda h, w: (step(h, w, s), h[0]), x, w),
    "scan in reverse": lambda x, w, s: qg.scan(
        lambda h, w: (step(h, w, s), h[0]), x, w, reverse=True
    ),
    "two stacks": lambda x, w, s: qg.scan(
        lambda h, w: (step(step(h, w[0], s), w[1], s), h[0]), x, (w, w * 2.0)
    ),
    "fori_loop": lambda x, w, s: qg.fori_loop(0, LAYERS, lambda i, h: step(h, w[i], s), x),
    "while_loop": lambda x, w, s: qg.while_loop(
        lambda c: c[1] < LAYERS, lambda c: (step(c[0], w[c[1]], s), c[1] + 1), (x, mx.array(0))
    )[0],
    "two axes": lambda x, w, s: qg.fori_loop(
        0, LAYERS, lambda i, h: step(h, qg.expand_dims(w, 1)[i, 0], s), x
    ),
    "nested": _nested,
    "fake quantization": _fake,
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("parameters", [[], [1]])
@pytest.mark.parametrize("name", LOOPS)
def test_stacks(name: str, parameters: list[int], form: str) -> None:
    def with_constant(x: Any) -> Any:
        return LOOPS[name](x, qg.tensor(STACK), FORMATS[form])

    def with_parameter(x: Any, w: Any) -> Any:
        return LOOPS[name](x, w, FORMATS[form])

    args = [X, STACK] if parameters else [X]
    fn = with_parameter if parameters else with_constant
    graph = qg.trace(fn, *args, parameters=parameters)
    verify(quantize_whole(graph, ""))
    plan = qg.optimize(graph, passes=PASSES, target="cpu")
    places = [(n.stage, n.output.ndim) for _, n in plan.graph.walk() if n.op == "quantize"]
    assert set(places) <= {("prepare" if parameters else "pack", d) for d in (3, 4)}
    assert places
    with not_compiled():
        results = [
            qg.tree.flatten(qg.compile(g, passes=[], target="cpu")(*args))[0]
            for g in (graph, plan.graph)
        ]
        plan.check(*args)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if name == "fake quantization" else None
    for old, now in zip(*results, strict=True):
        same = mx.allclose(old, now, **tolerance) if tolerance else mx.array_equal(old, now)
        assert same


MISSES: dict[str, Callable[[Any, Any], Any]] = {
    "computed slices": lambda x, w: qg.scan(lambda h, w: (step(h, w * 0.5, {}), h), x, w)[0],
    "kept slices": lambda x, w: qg.scan(lambda h, w: (step(h, qg.keep(w), {}), h), x, w)[0],
    "columns": lambda x, w: qg.fori_loop(
        0, LAYERS, lambda i, h: h + step(h[:, :64], w[i, :, :64], {}), x
    ),
    "several layers": lambda x, w: qg.fori_loop(
        0, LAYERS, lambda i, h: h + step(h, w[qg.stack([i, i])], {})[0], x
    ),
}


@pytest.mark.parametrize("name", MISSES)
def test_near_misses(name: str) -> None:
    graph = qg.trace(MISSES[name], X, STACK, parameters=[1])
    assert quantize_whole(graph, "") is graph
    plan = qg.optimize(graph, passes=PASSES, target="cpu")
    (quantize,) = [n for _, n in plan.graph.walk() if n.op == "quantize"]
    assert quantize.stage == "run"
    assert "quantize" not in [n.op for n in plan.graph.nodes]


def test_a_stack_that_comes_in_at_each_call_stays() -> None:
    graph = qg.trace(lambda x, w: LOOPS["scan"](x, w, {}), X, STACK)
    assert quantize_whole(graph, "") is graph


def test_text() -> None:
    def fn(w: Any, x: Any) -> Any:
        return qg.scan(lambda h, w: (qg.quantized_matmul(h, w), h[0, 0]), x, w)[0]

    graph = qg.trace(fn, STACK, X, parameters=[0], name="f")
    plan = qg.optimize(graph, passes=[HoistQuantize(), EliminateDeadCode()], target="cpu")
    assert plan.graph.format(origins=False).splitlines()[:3] == [
        "graph f(w: f32[3,128,128], x: f32[2,128]) -> f32[2,128]",
        "  prepare (once for parameters):",
        "    w_q: u32[3,128,16], w_s: f32[3,128,2], w_b: f32[3,128,2] = quantize(w) "
        "{bits=4, group_size=64}",
    ]
    (entry,) = [e for e in plan.ledger() if e.decision == "hoisted"]
    assert entry.reason == "of all layers at once, not at each turn"
