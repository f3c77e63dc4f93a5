"""What each format of a weight would cost at the result, and the choice under a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import InputError
from .budget import cheapest
from .rounding.formats import Format
from .rounding.hessians import damped, root
from .rounding.rounded import nearest
from .statistics.gathered import Array, Hessian, Statistics
from .weights import Weight

_ROWS = 160
"""Rows of a matrix on which formats are tried."""
_MATRICES = 16
"""Matrices of a stack on which they are."""


def weighs(h: Array, methods: Sequence[str]) -> Array:
    """What an error in each column costs; with GPTQ, where later columns make up for it."""
    return (np.diag(root(h)) ** 2 if "gptq" in methods else np.diag(h)).astype(np.float32)


def prices(
    statistics: Statistics, weight: Weight, hessian: Hessian, options: Sequence[Format],
    dtype: mx.Dtype, methods: Sequence[str], factors: Array | None = None,
) -> list[float]:  # fmt: skip
    """What each format would cost.

    Args:
        dtype: of affine scales.
        factors: what the columns are multiplied by before they are quantized.
    """
    costs = np.zeros(len(options))
    matrices = list(statistics.matrices(weight))
    picked = matrices[:: max(1, len(matrices) // _MATRICES)]
    for key, w in picked:
        h = hessian(key)
        if factors is not None:
            w, h = w * factors, h / np.outer(factors, factors)
        each = _of_matrix(w, damped(h), statistics.gains(key, len(w)), options, dtype, methods)
        costs += each * len(matrices) / len(picked)
    found: list[float] = costs.tolist()
    return found


def _of_matrix(
    w: Array, h: Array, gains: Array, options: Sequence[Format], dtype: mx.Dtype,
    methods: Sequence[str],
) -> Array:  # fmt: skip
    rows = np.arange(0, len(w), max(1, len(w) // _ROWS))
    share = gains.sum() / max(gains[rows].sum(), 1e-30)
    columns = weighs(h, methods)
    some, own = w[rows], gains[rows]
    costs = []
    for form in options:
        away = nearest(some, form, dtype, columns if "scales" in methods else None).values() - some
        each = (away**2) @ columns if "gptq" in methods else ((away @ h) * away).sum(1)
        costs.append(share * float((own * each).sum()) / 2)
    return np.array(costs)


def chosen(
    weights: Sequence[Weight], sizes: Sequence[Sequence[int]], budget: int,
    options: Mapping[str, Sequence[Format]], costs: Mapping[str, Sequence[float]],
) -> dict[str, Format]:  # fmt: skip
    """A format for each weight: by costs if there are some, else one for all.

    Args:
        sizes: bytes of each option of each weight.

    Raises:
        InputError: the budget is below the smallest formats.
    """
    if costs:
        picked = cheapest(sizes, [costs[w.name] for w in weights], budget)
    else:
        picked = _uniform(weights, sizes, budget, options)
    if picked is None:
        least = sum(map(min, sizes))
        raise InputError(
            f"fit: {budget:,} bytes are too few: the smallest formats take {least:,}",
            hint="give more bits or bytes, or more formats",
        )
    return {w.name: options[w.name][i] for w, i in zip(weights, picked, strict=True)}


def _uniform(
    weights: Sequence[Weight], sizes: Sequence[Sequence[int]], budget: int,
    options: Mapping[str, Sequence[Format]],
) -> list[int] | None:  # fmt: skip
    """The most bits that all weights can have, in the smallest groups that then fit."""
    forms = {form for some in options.values() for form in some}
    order: Any = sorted(forms, key=lambda f: (f.mode != "affine", -f.bits, f.group_size))
    for form in order:
        if not all(form in options[w.name] for w in weights):
            continue
        places = [options[w.name].index(form) for w in weights]
        if sum(s[i] for s, i in zip(sizes, places, strict=True)) <= budget:
            return places
    return None
