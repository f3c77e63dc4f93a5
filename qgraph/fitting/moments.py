"""What the inputs of a weight are like: second moments by column, or the whole Hessian XᵀX."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from .formats import as_numpy

MOST_COLUMNS = 16384
"""A Hessian of more columns than this is not gathered."""


class Moments:
    """The weighted second moments of rows of `columns` numbers, gathered batch by batch.

    >>> moments = Moments(2, full=True)
    >>> moments.add(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32))
    >>> moments.mean().tolist()
    [[5.0, 7.0], [7.0, 10.0]]
    """

    def __init__(self, columns: int, *, full: bool) -> None:
        self.full = full and columns <= MOST_COLUMNS
        self._sum: np.ndarray[Any, Any] = np.zeros((columns,) * (2 if self.full else 1))
        self.rows = 0

    def add(self, x: mx.array | np.ndarray[Any, Any], weights: np.ndarray | None = None) -> None:
        """Take in rows, (..., columns), each with what it weighs."""
        rows = (as_numpy(x) if isinstance(x, mx.array) else x).reshape(-1, len(self._sum))
        weighted = rows if weights is None else rows * weights.reshape(-1, 1)
        self._sum += weighted.T @ rows if self.full else (weighted * rows).sum(0)
        self.rows += len(rows)

    def mean(self) -> np.ndarray[Any, Any]:
        """The mean over rows: (columns, columns) if the moments are full, else (columns)."""
        return self._sum / max(self.rows, 1)
