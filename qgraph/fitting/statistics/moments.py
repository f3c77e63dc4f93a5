"""What the inputs of a weight are like: second moments by column, or the whole Hessian XᵀX."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from ..rounding.formats import as_numpy

MOST_COLUMNS = 16384
"""A Hessian of more columns than this is not gathered."""

_ALIKE = 3
"""So many rows of a text count as one: words near each other have much in common."""


class Moments:
    """The weighted second moments of rows of `columns` numbers, gathered batch by batch.

    >>> moments = Moments(2, full=True)
    >>> moments.add(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32))
    >>> moments.mean().tolist()
    [[5.0, 7.0], [7.0, 10.0]]
    """

    def __init__(self, columns: int, *, full: bool) -> None:
        self.full = full and columns <= MOST_COLUMNS
        self.sum: np.ndarray[Any, Any] = np.zeros((columns,) * (2 if self.full else 1))
        self.rows = 0

    @classmethod
    def of(cls, total: np.ndarray[Any, Any], rows: int) -> Moments:
        """Those of so many rows with this sum."""
        found = cls(len(total), full=total.ndim == 2)
        found.sum, found.rows = total, rows
        return found

    def add(self, x: mx.array | np.ndarray[Any, Any], weights: np.ndarray | None = None) -> None:
        """Take in rows, (..., columns), each with what it weighs."""
        rows = (as_numpy(x) if isinstance(x, mx.array) else x).reshape(-1, len(self.sum))
        weighted = rows if weights is None else rows * weights.reshape(-1, 1)
        self.sum += weighted.T @ rows if self.full else (weighted * rows).sum(0)
        self.rows += len(rows)

    def mean(self) -> np.ndarray[Any, Any]:
        """The mean over rows: (columns, columns) if the moments are full, else (columns)."""
        return self.sum / max(self.rows, 1)

    def hessian(self) -> np.ndarray[Any, Any]:
        """The mean, with what few rows say of pairs of columns taken back towards nothing.

        Rows that are few beside the columns hang together by chance, and what makes up for errors
        by it makes other text worse.  The share that is taken back is that of the columns among
        columns and rows (decision 35).
        """
        mean = self.mean()
        if not self.full:
            return mean
        columns = len(mean)
        shrunk = mean * (self.rows / (self.rows + _ALIKE * columns))
        np.fill_diagonal(shrunk, np.diag(mean))
        return shrunk
