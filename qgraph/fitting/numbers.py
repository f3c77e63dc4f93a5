"""The numbers of one weight, matrix by matrix, in the format that was chosen for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..quantization.fitted import Fitted
from .formats import Format, packed
from .gptq import gptq
from .hessians import damped, factor
from .refine import refined
from .rounded import Rounded, error, nearest
from .statistics import Array, Hessian, Statistics
from .weights import Weight

_ROWS = 8192
"""Rows that are fitted at a time."""


def fitted(
    statistics: Statistics, weight: Weight, hessian: Hessian, form: Format, dtype: mx.Dtype,
    methods: Sequence[str], mark: str, prices: Sequence[tuple[int, float]],
) -> Fitted:  # fmt: skip
    """The numbers that the methods find.

    Args:
        dtype: of affine scales.
        mark: of the weight.
        prices: bytes and cost of each format that it might have had; none if that was not asked.
    """
    parts, away, whole, how = [], 0.0, 0.0, ""
    for key, w in statistics.matrices(weight):
        h = hessian(key)
        near = h.astype(np.float32)
        for start in range(0, len(w), _ROWS):
            some = w[start : start + _ROWS]
            rounded, how = on_grid(some, h, form, dtype, methods)
            parts.append(packed(rounded.places, rounded.scales, rounded.biases, form, dtype))
            away += float(error(some, near, rounded).sum())
            whole += float(((some @ near) * some).sum())
    arrays: list[Any] = [
        None if part[0] is None else mx.concatenate(list(part)).reshape(*weight.shape[:-1], -1)
        for part in zip(*parts, strict=True)
    ]
    mx.eval([a for a in arrays if a is not None])
    words, scales, biases = arrays
    size = form.bytes(weight.shape, dtype.size)
    cost = next((price for one, price in prices if one == size), None)
    share = (max(away, 0.0) / max(whole, 1e-30)) ** 0.5
    settings = (form.bits, form.group_size, form.mode)
    return Fitted(words, scales, biases, *settings, mark, how, share, cost, prices)


def on_grid(
    w: Array, h: Array, form: Format, dtype: mx.Dtype, methods: Sequence[str]
) -> tuple[Rounded, str]:
    """A matrix in a format, and the name of the method; on MLX's default device if it is a GPU.

    Args:
        w: (rows, columns), float32.
        h: the Hessian of its columns, float64.
    """
    search = "scales" in methods
    if "gptq" in methods and np.count_nonzero(h - np.diag(np.diag(h))):
        h = damped(h)
        arrays: Any = w, factor(h), h.astype(np.float32)
        if mx.default_device() != mx.cpu:
            arrays = map(mx.array, arrays)
        here, upper, hessian = arrays
        rounded = gptq(here, upper, form, dtype, search=search)
        return (refined(here, hessian, rounded, dtype) if search else rounded).in_numpy(), "gptq"
    importance = np.diag(damped(h)).astype(np.float32) if search else None
    return nearest(w, form, dtype, importance), "scales" if search else "rounding"
