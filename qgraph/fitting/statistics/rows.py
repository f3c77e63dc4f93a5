"""Which rows go into which matrix of a weight, and what comes of each: experts have their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..rounding.formats import as_numpy
from .walk import Use

Array = np.ndarray[Any, Any]
Index = tuple[int, ...]
"""Which matrix of a stack; () is all of a weight that is no stack."""


class Rows(NamedTuple):
    """Rows of one matrix: `x` (rows, columns), and `y` (rows, outputs) if it was asked for."""

    matrix: Index
    x: Array | None
    y: Array | None


def of_each_matrix(use: Use, y: mx.array | None = None) -> Iterator[Rows]:
    """The rows that go into each matrix that a product multiplies by, and rows of `y`.

    Args:
        use: a product, or a lookup, whose rows of x are None.
        y: of the shape of its result, such as a gradient.
    """
    index = use.handle.index or ()
    ys = None if y is None else as_numpy(y)
    if use.x is None:
        yield Rows(index, None, None if ys is None else ys.reshape(-1, ys.shape[-1]))
        return
    x = as_numpy(use.x)
    if use.experts is None:
        rows = None if ys is None else ys.reshape(-1, ys.shape[-1])
        yield Rows(index, x.reshape(-1, x.shape[-1]), rows)
        return
    left, right = use.experts
    stack = x.reshape(-1, *x.shape[-2:])
    results = None if ys is None else ys.reshape(-1, *ys.shape[-2:])
    for expert in np.unique(right):
        here = right == expert
        own = stack[left[here]].reshape(-1, x.shape[-1])
        out = None if results is None else results[here].reshape(-1, results.shape[-1])
        yield Rows((*index, *map(int, np.unravel_index(expert, use.stack))), own, out)
