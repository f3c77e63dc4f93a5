"""Small models that a person might write: an MLP, experts, a state-space layer, convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn

import qgraph as qg

from .row import Rates, Row, evaluated

nn: Any = mlx.nn  # its types name none of its layers

GROUP = 32


def mlp(rates: Rates) -> Row:
    sizes = (784, 1024, 1024, 10)
    model = nn.Sequential(*_alternating([nn.Linear(a, b) for a, b in pairwise(sizes)]))
    mx.eval(model.parameters())
    x = mx.random.normal((64, 784))
    program = qg.compile(qg.from_mlx(model, x), target="cpu")
    flops = 2 * 64 * sum(a * b for a, b in pairwise(sizes))
    return Row("MLP, 64 rows", {"qgraph": evaluated(program, x), "MLX": evaluated(model, x)},
               flops / rates.flops)  # fmt: skip


def _alternating(layers: Sequence[Any]) -> list[Any]:
    return [part for layer in layers for part in (layer, nn.ReLU())][:-1]


def experts(rates: Rates) -> Row:
    """A token through 2 of 8 experts of 4 bits, 1024 wide."""
    up = mx.quantize(mx.random.normal((8, 2048, 1024)) / 32, GROUP, 4)
    down = mx.quantize(mx.random.normal((8, 1024, 2048)) / 45, GROUP, 4)
    router = mx.random.normal((1024, 8))
    mx.eval(up, down, router)

    def layer(ops: Any) -> Callable[[Any], Any]:
        def run(x: Any) -> Any:
            scores = x @ router
            picked = ops.argpartition(-scores, kth=1, axis=-1)[..., :2]
            weights = ops.softmax(ops.take_along_axis(scores, picked, axis=-1), axis=-1)
            h = x[:, None, None, :]
            made = ops.gather_qmm(h, *up, rhs_indices=picked, group_size=GROUP, bits=4)
            made = made * ops.sigmoid(made)
            y = ops.gather_qmm(made, *down, rhs_indices=picked, group_size=GROUP, bits=4)
            return (y[:, :, 0] * weights[..., None]).sum(axis=1)

        return run

    x = mx.random.normal((1, 1024))
    program = qg.jit(layer(qg), target="cpu")
    nbytes = sum(int(p.nbytes) for p in (*up, *down)) / 4
    return Row("experts, 2 of 8", {"qgraph": evaluated(program, x), "MLX": evaluated(layer(mx), x)},
               nbytes / rates.copy)  # fmt: skip


def mamba(rates: Rates) -> Row:
    """A step of a small state-space layer, scanned over 32 tokens."""
    wide, states = 512, 16
    weights = {n: mx.random.normal(s) / 16 for n, s in
               {"in": (256, 2 * wide), "bc": (wide, 2 * states), "dt": (wide, wide),
                "out": (wide, 256)}.items()}  # fmt: skip
    decay = -mx.exp(mx.random.normal((wide, states)))
    mx.eval(weights, decay)

    def model(ops: Any, x: Any) -> Any:
        def step(state: Any, token: Any) -> tuple[Any, Any]:
            h = token @ weights["in"]
            u, gate = h[:wide], h[wide:]
            u = u * ops.sigmoid(u)
            bc, dt = u @ weights["bc"], ops.exp(ops.sigmoid(u @ weights["dt"]))
            state = state * ops.exp(dt[:, None] * decay) + (dt * u)[:, None] * bc[None, :states]
            y = (state * bc[None, states:]).sum(axis=1)
            return state, (y * gate * ops.sigmoid(gate)) @ weights["out"]

        start = mx.zeros((wide, states))
        if ops is qg:
            return qg.scan(step, start, x)[1]
        made = []
        for i in range(x.shape[0]):
            start, y = step(start, x[i])
            made.append(y)
        return mx.stack(made)

    x = mx.random.normal((32, 256))
    program = qg.jit(lambda x: model(qg, x), target="cpu")
    plain = mx.compile(lambda x: model(mx, x))
    flops = 2 * 32 * sum(w.size for w in weights.values())
    return Row("Mamba, 32 tokens", {"qgraph": evaluated(program, x), "MLX": evaluated(plain, x)},
               flops / rates.flops)  # fmt: skip


def convolutions(rates: Rates) -> Row:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, 2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, 2),
        lambda x: x.reshape(x.shape[0], -1), nn.Linear(32 * 64, 10),
    )  # fmt: skip
    mx.eval(net.parameters())
    x = mx.random.normal((8, 32, 32, 3))
    program = qg.compile(qg.from_mlx(net, x), target="cpu")
    flops = 2 * 8 * (32 * 32 * 27 * 16 + 16 * 16 * 144 * 32 + 2048 * 10)
    return Row("conv net, 8 images", {"qgraph": evaluated(program, x), "MLX": evaluated(net, x)},
               flops / rates.flops)  # fmt: skip
