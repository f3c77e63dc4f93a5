"""The numbers of one weight, matrix by matrix, in the format that was chosen for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..quantization.fitted import Fitted
from .rounding.formats import Array, Format, packed, there
from .rounding.gptq import gptq
from .rounding.hessians import Curvature
from .rounding.refine import refined
from .rounding.rounded import Rounded, error, nearest
from .statistics.gathered import Hessian, Statistics
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
        curvature = Curvature(hessian(key))
        for start in range(0, len(w), _ROWS):
            some = there(w[start : start + _ROWS])
            rounded, how = on_grid(some, curvature, form, dtype, methods)
            away += float(error(some, curvature.hessian, rounded).sum())
            whole += float(((some @ curvature.hessian) * some).sum())
            parts.append(packed(rounded.places, rounded.scales, rounded.biases, form, dtype))
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
    w: Array, curvature: Curvature, form: Format, dtype: mx.Dtype, methods: Sequence[str]
) -> tuple[Rounded, str]:
    """A matrix in a format, and the name of the method.

    Args:
        w: (rows, columns), float32, where `curvature` has its arrays.
    """
    search = "scales" in methods
    if "gptq" in methods and curvature.whole:
        rounded = gptq(w, curvature.factor, form, dtype, search=search)
        return refined(w, curvature.damped, rounded, dtype) if search else rounded, "gptq"
    rounded = nearest(w, form, dtype, curvature.importance if search else None)
    return rounded, "scales" if search else "rounding"
