"""Hessians of a product's inputs, made fit to be inverted, and their factors."""

from __future__ import annotations

import numpy as np

from .formats import Array

DAMP = 0.01
"""What is added to the diagonal of a Hessian, as a share of its mean."""


def damped(hessian: Array, damp: float = DAMP) -> np.ndarray:
    """A Hessian that can be inverted; a column that never had an input counts as much as any."""
    h = np.array(hessian, dtype=np.float64)
    h[np.diag_indices_from(h)] += max(damp * float(np.diag(h).mean()), 1e-12)
    return h


def root(h: np.ndarray) -> np.ndarray:
    """The upper R with H = R Rᵀ; its squared diagonal is what an error in each column costs when
    later columns make up for it as well as they can."""
    return np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]


def factor(h: np.ndarray) -> np.ndarray:
    """The upper factor U of the inverse: inverse = Uᵀ U; float32."""
    return _inverse(root(h)).astype(np.float32)


def _inverse(upper: np.ndarray) -> np.ndarray:
    """Of a matrix that is zero below its diagonal, half by half: a sixth of the work of any."""
    size = len(upper)
    if size <= 128:
        return np.linalg.inv(upper)
    half = size // 2
    first, last = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    found = np.zeros_like(upper)
    found[:half, :half], found[half:, half:] = first, last
    found[:half, half:] = -(first @ (upper[:half, half:] @ last))
    return found
