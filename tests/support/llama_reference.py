"""The example's model in float64, by NumPy alone: a whole prompt at once, no cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from qgraph.examples.smollm2 import Llama
from qgraph.examples.smollm2_files import bits_of

from .arrays import to_numpy
from .reference import dequantize


def logits(model: Llama, ids: Any) -> Any:
    """(count, vocab), of each of the tokens `ids`, which are the first."""
    c = model.config
    h = _weight(model, "model.embed_tokens")[ids]
    for i in range(c.layers):
        name = f"model.layers.{i}"
        h = h + _attention(model, f"{name}.self_attn", _norm(model, f"{name}.input_layernorm", h))
        x = _norm(model, f"{name}.post_attention_layernorm", h)
        gate = _linear(model, f"{name}.mlp.gate_proj", x)
        x = gate / (1 + np.exp(-gate)) * _linear(model, f"{name}.mlp.up_proj", x)
        h = h + _linear(model, f"{name}.mlp.down_proj", x)
    return _linear(
        model, "model.embed_tokens" if c.tied else "lm_head", _norm(model, "model.norm", h)
    )


def _attention(model: Llama, name: str, x: Any) -> Any:
    c = model.config

    def heads(part: str, count: int) -> Any:
        y = _linear(model, f"{name}.{part}_proj", x)
        return y.reshape(-1, count, c.head_dim).transpose(1, 0, 2)

    q, k, v = heads("q", c.heads), heads("k", c.kv_heads), heads("v", c.kv_heads)
    q, k = (_turned(y, c.rope_base, c.rope_traditional) for y in (q, k))
    k, v = (np.repeat(y, c.heads // c.kv_heads, axis=0) for y in (k, v))
    scores = q @ k.transpose(0, 2, 1) * c.head_dim**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * np.tri(x.shape[0])
    y = weights / weights.sum(-1, keepdims=True) @ v
    return _linear(model, f"{name}.o_proj", y.transpose(1, 0, 2).reshape(x.shape[0], -1))


def _turned(x: Any, base: float, traditional: bool) -> Any:
    """x (heads, count, dim), pairs of its numbers turned by the positions 0, 1, ..."""
    _, count, dim = x.shape
    angles = np.arange(count)[:, None] * base ** (-2 * np.arange(dim // 2) / dim)
    first = slice(0, None, 2) if traditional else slice(0, dim // 2)
    second = slice(1, None, 2) if traditional else slice(dim // 2, None)
    turned = np.empty_like(x)
    turned[..., first] = x[..., first] * np.cos(angles) - x[..., second] * np.sin(angles)
    turned[..., second] = x[..., first] * np.sin(angles) + x[..., second] * np.cos(angles)
    return turned


def _norm(model: Llama, name: str, x: Any) -> Any:
    weight = to_numpy(model.weights[f"{name}.weight"]).astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + model.config.rms_eps) * weight


def _linear(model: Llama, name: str, x: Any) -> Any:
    return x @ _weight(model, name).T


def _weight(model: Llama, name: str) -> Any:
    group = model.config.group_size
    parts = (to_numpy(model.weights[f"{name}.{p}"]) for p in ("weight", "scales", "biases"))
    return dequantize(*parts, group_size=group, bits=bits_of(model.weights, name, group))
