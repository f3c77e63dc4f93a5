"""Gradients at products, those in loops among them, against MLX's."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import qgraph as qg
from qgraph.fitting.rounding.formats import as_numpy
from qgraph.fitting.statistics.attention import attention, gradients
from qgraph.fitting.statistics.backward import backward
from qgraph.fitting.statistics.walk import Walk, live_ranges
from qgraph.fitting.weights import prepared
from tests.support.fitting import Model, data


@pytest.mark.parametrize("mask", [None, "causal", "bool", "added"])
def test_attention_on_the_host_and_its_gradients_are_mlx_s(mask: str | None) -> None:
    keys = [mx.random.key(i) for i in range(5)]
    q = mx.random.normal((2, 4, 5, 8), key=keys[0])
    k, v = (mx.random.normal((2, 2, 7, 8), key=key) for key in keys[1:3])
    given: Any = mask
    if mask == "bool":
        given = mx.random.uniform(shape=(2, 1, 5, 7), key=keys[3]) < 0.8
    elif mask == "added":
        given = mx.random.normal((5, 7), key=keys[3])

    def own(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        return [mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=given)]

    up = mx.random.normal((2, 4, 5, 8), key=keys[4])
    (y,), wanted = mx.vjp(own, [q, k, v], [up])
    assert mx.allclose(attention(q, k, v, 0.3, given), y, atol=1e-5)
    for found, one in zip(gradients(q, k, v, 0.3, given, up), wanted, strict=True):
        assert mx.allclose(found, one, atol=1e-5)


def looped(w: mx.array, stack: mx.array) -> Any:
    """One weight at every turn, and one of a stack at each."""

    def turn(i: Any, h: Any) -> Any:
        return qg.tanh(h @ w.T)

    def layer(h: Any, one: Any) -> Any:
        h = h + qg.tanh(h @ one.swapaxes(-1, -2))
        return h, h.sum()

    return lambda x: qg.scan(layer, qg.fori_loop(0, 3, turn, x), stack)[0]


def test_gradients_at_products_are_mlx_s(model: Model) -> None:
    ids = data(1)[0]
    found = prepared(qg.from_mlx(model, ids), qg.Quantize(bits=8, group_size=32))
    up = mx.random.normal((2, 16, 96))
    sums: dict[str, np.ndarray] = {}

    def heard(use: Any, gradient: mx.array) -> None:
        if use.x is not None and "embed" not in use.handle.name:
            rows = as_numpy(gradient).reshape(-1, gradient.shape[-1])
            sums[use.handle.name] = rows.T @ as_numpy(use.x).reshape(len(rows), -1)

    backward(Walk(found), [ids], lambda _: up, heard)
    wanted = nn.value_and_grad(model, lambda m: (m(ids) * up).sum())(model)[1]
    assert set(sums) == {"up.weight", "down.weight"}
    for name, got in sums.items():
        np.testing.assert_allclose(got, np.array(wanted[name[:-7]]["weight"]), atol=1e-4)


def test_a_backward_pass_runs_a_layer_again_and_no_more() -> None:
    """What lives at cuts between layers is all that is kept of the forward pass."""
    from qgraph.fitting.statistics.backward import _cuts

    layers = [(nn.RMSNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)) for _ in range(6)]

    def fn(x: mx.array) -> mx.array:
        for norm, up, down in layers:
            x = x + down(nn.silu(up(norm(x))))
        return x

    graph = prepared(qg.from_mlx(fn, mx.ones((1, 8, 32))), qg.Quantize(bits=8, group_size=32)).graph
    constants = {i for i, n in enumerate(graph.nodes) if n.op in ("constant", "quantize")}
    runs = [len({*range(*cut)} - constants) for cut in _cuts(graph, live_ranges(graph))]
    assert max(runs) <= sum(runs) / len(layers)


def test_gradients_and_inputs_in_loops() -> None:
    """Each turn's, for a weight that all share and for a stack's."""
    w, stack = (mx.random.normal(s, key=mx.random.key(1)) / 8 for s in ((64, 64), (2, 64, 64)))
    x = mx.random.normal((4, 64), key=mx.random.key(2))
    graph = qg.trace(looped(w, stack), x)
    found = prepared(graph, qg.Quantize(bits=8, group_size=32))
    assert {name: weight.inside for name, weight in found.weights.items()} == {
        "w": True, "stack": True
    }  # fmt: skip
    up = mx.random.normal((4, 64), key=mx.random.key(3))
    sums: dict[Any, Any] = {}

    def heard(use: Any, gradient: mx.array) -> None:
        key = use.handle.name, use.handle.index
        sums[key] = sums.get(key, 0) + np.array(gradient).T @ np.array(use.x)

    backward(Walk(found), [x], lambda _: up, heard)

    def loss(w: mx.array, stack: mx.array) -> mx.array:
        h = x
        for _ in range(3):
            h = mx.tanh(h @ w.T)
        for i in range(2):
            h = h + mx.tanh(h @ stack[i].T)
        return (h * up).sum()

    at_w, at_stack = (np.array(g) for g in mx.grad(loss, argnums=(0, 1))(w, stack))
    np.testing.assert_allclose(sums["w", ()], at_w, atol=1e-5)
    for i in range(2):
        np.testing.assert_allclose(sums["stack", (i,)], at_stack[i], atol=1e-5)
    config = qg.Quantize.fit(graph, [x, x + 1], bits=6)
    assert config.fitted is not None
    assert {n: one.shape for n, one in config.fitted.items()} == {
        "w": (64, 64), "stack": (2, 64, 64)
    }  # fmt: skip
    near = qg.compile(graph, quantize=config)(x)
    assert mx.abs(near - qg.compile(graph)(x)).max() < 0.2
