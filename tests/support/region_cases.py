"""Functions that a region holds, with arguments, for `test_region_ops.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

import qgraph as qg

Function = Callable[..., Any]

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
INTEGERS = (mx.int8, mx.uint8, mx.int16, mx.uint16, mx.int32, mx.uint32, mx.int64, mx.uint64)


def numbers(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Normal numbers, or integers from 0 to 9."""
    made = np.random.default_rng(seed).normal(size=shape)
    if dtype == mx.bool_:
        return mx.array(made > 0)
    if dtype in INTEGERS:
        return mx.array(np.abs(made * 4).astype(np.int32)).astype(dtype)
    return mx.array(made.astype(np.float32)).astype(dtype)


def positive(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.abs(numbers(*shape, seed=seed, dtype=dtype)) + mx.array(0.25, dtype)


def unit(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Between -1 and 1."""
    return mx.tanh(numbers(*shape, seed=seed, dtype=dtype)) * mx.array(0.98, dtype)


ANY = ["abs", "negative", "sign", "square"]
REAL = ["exp", "expm1", "sigmoid", "tanh", "erf", "sin", "cos", "tan", "sinh", "cosh", "arctan",
        "arcsinh", "floor", "ceil", "trunc", "round", "degrees", "radians", "isnan", "isinf",
        "isfinite", "isposinf", "isneginf", "logical_not"]  # fmt: skip
POSITIVE = ["reciprocal", "sqrt", "rsqrt", "log", "log2", "log10", "log1p"]
UNIT = ["arcsin", "arccos", "arctanh", "erfinv"]
BINARY = ["add", "subtract", "multiply", "maximum", "minimum"]
REAL_BINARY = ["divide", "power", "remainder", "floor_divide", "arctan2", "logaddexp"]
COMPARISONS = ["equal", "not_equal", "less", "less_equal", "greater", "greater_equal",
               "logical_and", "logical_or"]  # fmt: skip
BITS = ["bitwise_and", "bitwise_or", "bitwise_xor", "left_shift", "right_shift"]

POINTWISE: dict[str, tuple[str, Callable[..., mx.array], int]] = {
    **{name: (name, numbers, 1) for name in ANY + REAL},
    **{name: (name, positive, 1) for name in POSITIVE},
    "arccosh": ("arccosh", lambda *s, **k: positive(*s, **k) + 1, 1),
    **{name: (name, unit, 1) for name in UNIT},
    **{name: (name, numbers, 2) for name in BINARY + COMPARISONS},
    **{name: (name, positive, 2) for name in REAL_BINARY},
}

_IDS = mx.array([[3, 0], [5, 5]])
_INT = mx.array([2])

SHAPED: dict[str, Function] = {
    "softmax": lambda x: qg.softmax(x, axis=-1),
    "softmax, first axis": lambda x: qg.softmax(x, axis=0),
    "sum": lambda x: qg.sum(x, axis=1),
    "sum of two": lambda x: qg.sum(x, axis=(0, 2), keepdims=True),
    "mean": lambda x: qg.mean(x, axis=-1, keepdims=True),
    "prod": lambda x: qg.prod(x * 0.25 + 1, axis=-1),
    "max": lambda x: qg.max(x, axis=0),
    "min": lambda x: qg.min(x),
    "var": lambda x: qg.var(x, axis=-1),
    "logsumexp": lambda x: qg.logsumexp(x, axis=-1),
    "all": lambda x: qg.all(x > -1, axis=-1),
    "any": lambda x: qg.any(x > 1, axis=1),
    "argmax": lambda x: qg.argmax(x, axis=-1),
    "argmin": lambda x: qg.argmin(x, axis=0),
    "cumsum": lambda x: qg.cumsum(x, axis=-1),
    "cumsum, reversed": lambda x: qg.cumsum(x, axis=0, reverse=True),
    "cumsum, exclusive": lambda x: qg.cumsum(x, axis=1, inclusive=False),
    "cumprod": lambda x: qg.cumprod(x, axis=-1),
    "cummax": lambda x: qg.cummax(x, axis=-1),
    "logcumsumexp": lambda x: qg.logcumsumexp(x, axis=-1),
    "transposed": lambda x: qg.transpose(x, (2, 0, 1)) + 1,
    "reshaped": lambda x: qg.transpose(x, (1, 0, 2)).reshape(-1, 4) * 2,
    "sliced": lambda x: x[:, 1:, ::2] - x[:, :-1, ::2],
    "flipped": lambda x: qg.flip(x, 1) + x,
    "indexed": lambda x: x[0, ..., None] * 1.5,
    "joined": lambda x: qg.concatenate([x, x * 2, x[:, :1]], axis=1),
    "joined flat": lambda x: qg.concatenate([x, qg.swapaxes(x, 0, 1) * 2], axis=None),
    "at least 3d": lambda x: qg.atleast_3d(x, x * 2),
    "stacked": lambda x: qg.stack([x, -x], axis=1),
    "split": lambda x: [p + 1 for p in qg.split(x, 2, axis=-1)],
    "broadcast": lambda x: qg.broadcast_to(x[:1], (5, 6, 8)) + x[0, 0],
    "taken": lambda x: qg.take(x, _IDS, axis=1),
    "taken, flat": lambda x: qg.take(x, _IDS),
    "taken from the end": lambda x: qg.take(x, mx.array([-1, -3]), axis=0),
    "taken along": lambda x: qg.take_along_axis(x, qg.argmax(x, axis=-1, keepdims=True), axis=-1),
    "window": lambda x: qg.slice(x, _INT, (1,), (3, 2, 8)),
    "updated": lambda x: qg.slice_update(x, x[:, :2] * 3, _INT, (1,)),
    "rms": lambda x: qg.fast.rms_norm(x, x[0, 0], 1e-5),
    "rms without weight": lambda x: qg.fast.rms_norm(x, None, 1e-5),
    "layer norm": lambda x: qg.fast.layer_norm(x, x[0, 0], x[1, 1], 1e-5),
    "rope": lambda x: qg.fast.rope(x, 8, traditional=False, base=100.0, scale=1.0, offset=3),
    "rope, traditional": lambda x: qg.fast.rope(
        x, 4, traditional=True, base=100.0, scale=0.5, offset=mx.array(7)),
    "where": lambda x: qg.where(x > 0, x, 0.5),
    "clipped": lambda x: qg.clip(x, -0.5, 0.75),
    "cast": lambda x: (x * 3).astype(mx.int32),
    "casts": lambda x: x.astype(mx.float16).astype(mx.bfloat16).astype(mx.float32),
    "filled": lambda x: x + qg.arange(8).astype(x.dtype) + qg.ones((6, 1), x.dtype),
    "dense product": lambda x: x @ qg.transpose(x[0]),
    "batch of products": lambda x: x @ qg.swapaxes(x, 1, 2),
    "addmm": lambda x: qg.addmm(x[0, :, :6], x[0], qg.transpose(x[1]), alpha=0.5),
    "padded": lambda x: qg.pad(x, ((1, 2), (0, 0), (3, 0)), constant_values=1.5),
    "sorted": lambda x: qg.sort(x, axis=1),
    "argsorted": lambda x: qg.argsort(x, axis=-1),
    "triangle": lambda x: qg.tril(x),
    "std": lambda x: qg.std(x, axis=-1),
    "no numbers": lambda x: qg.nan_to_num(x / (x - x[:, :1])),
    "close": lambda x: qg.isclose(x, x + 1e-3),
    "repeated": lambda x: qg.repeat(x, 2, axis=1) + qg.tile(x[:, :1], (1, 12, 1)),
    "outer": lambda x: qg.outer(x[0, 0], x[1, 1]),
    "gated": lambda x: (lambda g, u: g * qg.sigmoid(g) * u)(
        x @ qg.transpose(x[0]), x @ qg.transpose(x[1])),
    "bias and activation": lambda x: qg.tanh(x @ qg.transpose(x[0]) + x[0, 0, :6]),
    "residual": lambda x: x[:, :, :6] + x @ qg.transpose(x[0]),
}  # fmt: skip


def attention(**settings: Any) -> Function:
    return lambda q, k, v, *more: qg.fast.scaled_dot_product_attention(
        q, k, v, scale=0.25, **{**settings, **dict(zip(("mask",), more, strict=False))}
    )
