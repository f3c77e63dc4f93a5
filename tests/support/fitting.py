"""A layer, a model and data that tests of fits share."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qgraph.fitting.rounding.hessians import damped

RNG = np.random.default_rng(0)


def layer(rows: int = 24, columns: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and the Hessian of inputs whose columns hang together."""
    w = RNG.normal(size=(rows, columns)).astype(np.float32)
    mixing = RNG.normal(size=(columns, columns)) * RNG.uniform(0.1, 1, columns)
    x = RNG.normal(size=(1000, columns)) @ mixing
    return w, damped(x.T @ x / 1000)


class Model(nn.Module):
    """An embedding that is the head as well, and two products after a norm between."""

    def __init__(self, width: int = 64, vocab: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.norm = nn.RMSNorm(width)
        self.norm.weight = mx.exp(1.5 * mx.random.normal((width,), key=mx.random.key(9)))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def __call__(self, ids: mx.array) -> mx.array:
        h = self.embed(ids)
        h = h + self.down(nn.silu(self.up(self.norm(h))))
        return self.embed.as_linear(h)


def data(count: int = 6) -> list[mx.array]:
    return [mx.random.randint(0, 96, (2, 16), key=mx.random.key(i)) for i in range(count)]


def shrunk(h: np.ndarray, rows: int) -> np.ndarray:
    """A Hessian of so many rows as a fit takes it: what it says of pairs is trusted in part."""
    trust = rows / (rows + 3 * len(h))
    return np.where(np.eye(len(h), dtype=bool), h, trust * h)
