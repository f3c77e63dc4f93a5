"""Layers, losses and transforms of `mlx.nn`: imported as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

import qgraph as qg

mx.random.seed(12)
X = mx.random.normal((2, 8, 16))
IMAGE = mx.random.normal((1, 8, 8, 3))
SQUARE = mx.random.normal((16, 16))
LOGITS, TARGETS = mx.random.normal((4, 10)), mx.array([1, 2, 3, 4])
MODULES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "attention": (nn.MultiHeadAttention(16, 4), (X, X, X)),
    "encoder": (nn.TransformerEncoder(2, 16, 4), (X, None)),
    "transformer": (nn.Transformer(16, 4, 2, 2), (X, X, None, None, None)),
    "lstm": (nn.LSTM(16, 8), (X,)),
    "gru": (nn.GRU(16, 8), (X,)),
    "rnn": (nn.RNN(16, 8), (X,)),
    "conv1d": (nn.Conv1d(16, 4, 3), (X,)),
    "conv2d": (nn.Conv2d(3, 4, 3, padding=1), (IMAGE,)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2), (IMAGE,)),
    "batch norm": (nn.BatchNorm(16), (X,)),
    "group norm": (nn.GroupNorm(4, 16), (X,)),
    "instance norm": (nn.InstanceNorm(16), (X,)),
    "pool": (nn.MaxPool2d(2, 2), (IMAGE,)),
    "mean pool": (nn.AvgPool1d(2, 2), (X,)),
    "positions": (nn.SinusoidalPositionalEncoding(16), (mx.arange(8),)),
    "alibi": (nn.ALiBi(), (mx.zeros((1, 4, 8, 8)),)),
    "linear upsampling": (nn.Upsample(2.0, mode="linear"), (IMAGE,)),
    "nearest upsampling": (nn.Upsample(2.0), (IMAGE,)),
    "prelu": (nn.PReLU(), (X,)),
    "bilinear": (nn.Bilinear(16, 16, 4), (X, X)),
    "dropout": (nn.Dropout(0.5), (X,)),
    "quantized": (nn.QuantizedLinear(64, 16), (mx.ones((2, 64)),)),
    "quantized table": (nn.QuantizedEmbedding(10, 64), (mx.array([[1, 2]]),)),
}
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "cross entropy": (nn.losses.cross_entropy, (LOGITS, TARGETS)),
    "huber": (nn.losses.huber_loss, (X, X * 2)),
    "gradient": (
        lambda w: mx.grad(lambda w: nn.losses.mse_loss(mx.tanh(X @ w), X * 0))(w), (SQUARE,)
    ),
    "value and gradient": (
        lambda w: mx.value_and_grad(lambda w: mx.softmax(X @ w, -1).max())(w), (SQUARE,)
    ),
    "jvp": (lambda a: mx.jvp(lambda t: mx.sin(t) * t, [a], [a])[1], (X,)),
    "vmap": (lambda a: mx.vmap(nn.gelu)(a), (X,)),
    "nested vmap": (lambda a: mx.vmap(mx.vmap(lambda r: mx.sort(r) @ SQUARE))(a), (X,)),
}  # fmt: skip


def agree(fn: Any, args: tuple[Any, ...]) -> qg.Graph:
    expected = qg.tree.flatten(fn(*args))[0]
    graph = qg.from_mlx(fn, *args)
    exact = qg.compile(graph, target="cpu", passes=[])(*args)
    assert all(
        mx.array_equal(a, b).item()
        for a, b in zip(qg.tree.flatten(exact)[0], expected, strict=True)
    )
    optimized = qg.compile(graph, target="cpu")(*args)
    for a, b in zip(qg.tree.flatten(optimized)[0], expected, strict=True):
        assert mx.allclose(a, b, rtol=1e-4, atol=1e-5).item()
    return graph


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    module, args = MODULES[name]
    module.eval()
    mx.eval(module.parameters())
    graph = agree(module, args)
    names = {node.args["name"] for node in graph.constants()}
    assert names >= set(dict(nn.utils.tree_flatten(module.trainable_parameters())))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    agree(*FUNCTIONS[name])


def test_running_statistics_are_not_those_of_the_import() -> None:
    norm = nn.BatchNorm(16)
    before = mx.array(norm.running_mean)
    graph = qg.from_mlx(norm, X)
    assert mx.array_equal(norm.running_mean, before).item()
    assert mx.allclose(qg.compile(graph)(X), norm(X), atol=1e-5).item()
