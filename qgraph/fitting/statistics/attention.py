"""Attention and its gradients in NumPy, for CPUs: MLX multiplies with a reference BLAS there."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from ..rounding.formats import as_numpy

Array = np.ndarray[Any, Any]


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any = None) -> mx.array:
    """softmax(scale q kᵀ + mask) v, as `mx.fast.scaled_dot_product_attention` has it.

    >>> x = mx.ones((1, 2, 4, 8))
    >>> attention(x, x, x, 1.0, "causal").shape
    (1, 2, 4, 8)
    """
    queries, keys, values = _heads(q, k, v)
    y = _weights(queries, keys, scale, mask, q.shape) @ values
    return mx.array(y.reshape(*q.shape[:3], v.shape[3])).astype(q.dtype)


def gradients(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any, given: mx.array
) -> list[mx.array]:
    """The gradients at q, k and v for one at the result."""
    queries, keys, values = _heads(q, k, v)
    p = _weights(queries, keys, scale, mask, q.shape)
    g = as_numpy(given).reshape(*queries.shape[:-1], -1)
    at_p = g @ values.swapaxes(-1, -2)
    at_scores = p * (at_p - (at_p * p).sum(-1, keepdims=True)) * np.float32(scale)
    at_q = (at_scores @ keys).reshape(q.shape)
    at_k = (at_scores.swapaxes(-1, -2) @ queries).sum(2)
    at_v = (p.swapaxes(-1, -2) @ g).sum(2)
    return [mx.array(a).astype(b.dtype) for a, b in ((at_q, q), (at_k, k), (at_v, v))]


def _heads(q: mx.array, k: mx.array, v: mx.array) -> tuple[Array, Array, Array]:
    """Queries (batch, kv heads, queries of one, rows, dim), keys and values with an axis of one."""
    batch, _, rows, dim = q.shape
    queries = as_numpy(q).reshape(batch, k.shape[1], -1, rows, dim)
    return queries, as_numpy(k)[:, :, None], as_numpy(v)[:, :, None]


def _weights(q: Array, k: Array, scale: float, mask: Any, shape: tuple[int, ...]) -> Array:
    scores: Array = (q @ k.swapaxes(-1, -2)) * np.float32(scale)
    rows, columns = scores.shape[-2:]
    if isinstance(mask, str):
        seen: Any = np.tri(rows, columns, columns - rows, dtype=bool)
        scores = np.where(seen, scores, np.float32(-np.inf))
    elif mask is not None:
        whole = mx.broadcast_to(mask, (*shape[:2], rows, columns))
        if mask.dtype == mx.bool_:
            seen = np.array(whole).reshape(scores.shape)
            scores = np.where(seen, scores, np.finfo(np.float32).min)
        else:
            scores = scores + as_numpy(whole).reshape(scores.shape)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    return scores
