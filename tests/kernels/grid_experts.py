"""Layers of experts, as regions on CUDA hold them, with the same in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

import qgraph as qg
from tests.support.arrays import to_numpy

Route = Callable[[Any, int], tuple[Any, Any]]


def softmax_first(logits: Any, count: int) -> tuple[Any, Any]:
    """qwen3_moe's: weights are shares of the chosen ones."""
    gates = qg.softmax(logits, axis=-1, precise=True)
    chosen = qg.argpartition(gates, kth=-count, axis=-1)[..., -count:]
    weights = qg.take_along_axis(gates, chosen, axis=-1)
    return chosen, weights / qg.sum(weights, axis=-1, keepdims=True)


def softmax_last(logits: Any, count: int) -> tuple[Any, Any]:
    """gpt_oss'."""
    chosen = qg.argpartition(logits, kth=-count, axis=-1)[..., -count:]
    return chosen, qg.softmax(qg.take_along_axis(logits, chosen, axis=-1), axis=-1, precise=True)


def least_of_negative(logits: Any, count: int) -> tuple[Any, Any]:
    """deepseek's: chosen by one number and weighed by another."""
    scores = qg.sigmoid(logits)
    chosen = qg.argpartition(-(scores + 0.25), kth=count - 1, axis=-1)[..., :count]
    weights = qg.take_along_axis(scores, chosen, axis=-1)
    return chosen, weights / (qg.sum(weights, axis=-1, keepdims=True) + 1e-20) * 2.5


def shares(route: Route, logits: Any) -> Any:
    """The weights of chosen experts in float64."""
    if route is least_of_negative:
        scores = 1 / (1 + np.exp(-logits))
        return scores / scores.sum(-1, keepdims=True) * 2.5
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


@dataclass(frozen=True)
class Case:
    """A layer.

    Attributes:
        count: experts of a row.
        biases: have experts any?
        common: is there an expert of all rows beside them, with a gate of one column?
    """

    dtype: mx.Dtype = mx.bfloat16
    mode: str = "affine"
    bits: int = 4
    group: int = 64
    rows: int = 1
    hidden: int = 128
    inner: int = 64
    experts: int = 40
    count: int = 4
    route: Route = softmax_first
    biases: bool = False
    common: bool = False

    def __str__(self) -> str:
        biases = "-biases" * self.biases + "-common" * self.common
        return f"{self.mode}{self.bits}-g{self.group}-{self.rows}-{self.route.__name__}{biases}"

    @property
    def settings(self) -> dict[str, Any]:
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}

    def quantized(self, *shape: int) -> tuple[Any, Any]:
        w = (mx.random.normal(shape) * shape[-1] ** -0.5).astype(self.dtype)
        w = mx.quantize(w, **self.settings)
        return w, to_numpy(mx.dequantize(*w, **self.settings, dtype=mx.float32))

    def build(self) -> tuple[Callable[..., Any], mx.array, Any]:
        """The function of a layer, its input, and what it gives in float64."""
        mx.random.seed(7)
        e, h, i = self.experts, self.hidden, self.inner
        (first, first_), (router, router_), (up, up_), (gate, gate_), (down, down_) = (
            self.quantized(*shape) for shape in ((h, h), (e, h), (e, i, h), (e, i, h), (e, h, i))
        )
        (both, both_), (last, last_), (share, share_) = (
            self.quantized(*shape) for shape in ((2 * i, h), (h, i), (1, h))
        )
        norm = mx.random.uniform(0.5, 1.5, (h,)).astype(self.dtype)
        bias = [(mx.random.normal(shape) * 0.3).astype(self.dtype) for shape in ((e, i), (e, h))]

        def by(x: Any, w: Any, chosen: Any, own: Any = None) -> Any:
            y = qg.gather_qmm(x, *w, rhs_indices=chosen, transpose=True, **self.settings)
            return y if own is None else y + qg.expand_dims(qg.take(own, chosen, axis=0), -2)

        def fn(x: Any) -> Any:
            x = x + qg.quantized_matmul(x, *first, **self.settings)
            n = qg.fast.rms_norm(x, norm, 1e-5)
            logits = qg.quantized_matmul(n, *router, **self.settings)
            chosen, weights = self.route(logits, self.count)
            wide = qg.expand_dims(n, (-2, -3))
            g = by(wide, gate, chosen, bias[0] if self.biases else None)
            inner = g * qg.sigmoid(g) * by(wide, up, chosen)
            y = by(inner, down, chosen, bias[1] if self.biases else None).squeeze(-2)
            y = qg.sum(y * weights[..., None], axis=-2)
            if self.common:
                g, u = qg.split(qg.quantized_matmul(n, *both, **self.settings), 2, axis=-1)
                all = qg.quantized_matmul(g * qg.sigmoid(g) * u, *last, **self.settings)
                y = y + qg.sigmoid(qg.quantized_matmul(n, *share, **self.settings)) * all
            return x + y

        # Rows whose choice rounding does not change.
        some = (mx.random.normal((64, h))).astype(self.dtype)
        x = to_numpy(some) + to_numpy(some) @ first_.T
        n = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * to_numpy(norm)
        logits = n @ router_.T
        order = np.argsort(logits, -1)
        ranked = np.take_along_axis(logits, order, -1)
        gaps = ranked[:, -self.count] - ranked[:, -self.count - 1]
        rows = np.argsort(gaps)[-self.rows :]
        chosen = order[rows, -self.count :]
        weights = shares(self.route, np.take_along_axis(logits[rows], chosen, -1))
        wanted = x[rows]
        for row, own in enumerate(rows if self.common else ()):
            g, u = np.split(both_ @ n[own], 2)
            gate_of_all = 1 / (1 + np.exp(-(share_[0] @ n[own])))
            wanted[row] += gate_of_all * (last_ @ (g / (1 + np.exp(-g)) * u))
        for row, own in enumerate(rows):
            for pick, weight in zip(chosen[row], weights[row], strict=True):
                g = gate_[pick] @ n[own] + self.biases * to_numpy(bias[0])[pick]
                inner = g / (1 + np.exp(-g)) * (up_[pick] @ n[own])
                wanted[row] += weight * (
                    down_[pick] @ inner + self.biases * to_numpy(bias[1])[pick]
                )
        return fn, some[mx.array(rows)][:, None], wanted[:, None]
