"""Experts of a mixture: each is fitted on the rows that go to it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import qgraph as qg
from qgraph.fitting.statistics.gathered import Statistics
from qgraph.fitting.statistics.walk import Walk
from qgraph.fitting.weights import prepared
from tests.support.fitting import shrunk


class Experts(nn.Module):
    """Each row goes to one of four experts, whose inputs differ."""

    def __init__(self) -> None:
        super().__init__()
        self.up = mx.random.normal((4, 64, 64), key=mx.random.key(1)) / 8

    def __call__(self, x: mx.array, expert: mx.array) -> mx.array:
        rows = mx.expand_dims(x, -2)
        return mx.gather_mm(rows, self.up.swapaxes(-1, -2), rhs_indices=expert).squeeze(-2)


def experts() -> tuple[Experts, list[tuple[mx.array, mx.array]]]:
    """Each expert's inputs lie mostly in columns of its own, which hang together; the last gets
    no row."""
    batches = []
    for i in range(4):
        expert = mx.random.randint(0, 3, (48,), key=mx.random.key(i))
        own = mx.arange(64)[None] // 16 == expert[:, None]
        common, each = (mx.random.normal((48, n), key=mx.random.key(10 * n + i)) for n in (1, 64))
        x = (common + 0.3 * each) * mx.where(own, 4.0, 0.1)
        batches.append((x, expert))
    return Experts(), batches


def test_experts_have_hessians_of_their_own() -> None:
    model, batches = experts()
    graph = qg.from_mlx(model, *batches[0])
    found = prepared(graph, qg.Quantize(bits=8, group_size=32))
    (weight,) = found.weights.values()
    statistics = Statistics(found, full=True)
    uses: list[Any] = []
    for x, expert in batches:
        walk = Walk(found, listener=uses.append)
        env = walk.start([x, expert])
        for node in found.graph.nodes:
            walk.run(node, env)
    hessian = statistics.of(weight, uses)
    x, expert = (np.concatenate([np.array(b[i], np.float64) for b in batches]) for i in range(2))
    alone = [x[expert == e] for e in range(3)]
    each = [shrunk(rows.T @ rows / len(rows), len(rows)) for rows in alone]
    everything = sum(each) / 3
    for e, rows in enumerate(alone):
        wanted = (len(rows) * each[e] + 16 * everything) / (len(rows) + 16)
        np.testing.assert_allclose(hessian((weight.name, (e,))), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(hessian((weight.name, (3,))), everything, rtol=1e-4, atol=1e-4)


def test_experts_fitted_each_on_its_rows_come_nearer() -> None:
    model, batches = experts()
    x, expert = batches[0]

    def away(*methods: str) -> float:
        config = qg.Quantize.fit(
            model,
            batches,
            bits=4,
            methods=methods,
            scales=mx.float16,
            formats=[{"bits": 3, "group_size": 32}],
        )
        program = qg.compile(model, x, expert, quantize=config)
        return float(((program(x, expert) - model(x, expert)) ** 2).mean())

    plain, compensated = away(), away("gptq")
    assert compensated < 0.9 * plain
    assert away("scales", "gptq", "sensitivity") < 0.8 * compensated
