"""Hessians of a product's inputs, made fit to be inverted, and their factors."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property

import mlx.core as mx
import numpy as np

from .formats import Array, of, there

DAMP = 0.01
"""What is added to the diagonal of a Hessian, as a share of its mean."""

_ON_HOST = 512
"""Columns of the blocks that a GPU leaves to the host."""


class Curvature:
    """How the error of a product grows with that of its weight; what is asked for is made once.

    Args:
        hessian: of the inputs, float64.

    Attributes:
        hessian, damped: float32, where the methods run.
        whole: does it say anything of pairs of columns?
    """

    def __init__(self, hessian: np.ndarray) -> None:
        self._exact = hessian
        self.whole = bool(np.count_nonzero(hessian) > len(hessian))
        self.hessian: Array = there(hessian.astype(np.float32))

    @cached_property
    def damped(self) -> Array:
        return there(damped(self._exact).astype(np.float32))

    @cached_property
    def importance(self) -> Array:
        """Of each column alone."""
        return of(self.damped).diag(self.damped)

    @cached_property
    def factor(self) -> Array:
        """See `factor`."""
        if isinstance(self.damped, mx.array):
            with suppress(np.linalg.LinAlgError):  # float32 may not be enough
                return factor_by_halves(self.damped)
        return there(factor(damped(self._exact)))


def damped(hessian: np.ndarray, damp: float = DAMP) -> np.ndarray:
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


def factor_by_halves(h: mx.array, host: int = _ON_HOST) -> mx.array:
    """What `factor` gives, nearly all of it by large products, which suits a GPU.

    With H = [A B; Bᵀ C]: if C has the factor V, what is left of A is A - X Xᵀ with X = B Vᵀ; if
    that has the factor W, H has [W, -W X V; 0, V].

    Args:
        h: float32.
        host: columns of the blocks that `factor` is for.
    """
    size = len(h)
    if size <= host:
        return mx.array(factor(np.array(h, np.float64)))
    half = size // 2
    last = factor_by_halves(h[half:, half:], host)
    across = _product(h[:half, half:], last.T)
    first = factor_by_halves(h[:half, :half] - _product(across, across.T), host)
    corner = -_product(_product(first, across), last)
    rows = [first, corner], [mx.zeros_like(corner.T), last]
    found = mx.concatenate([mx.concatenate(list(row), axis=1) for row in rows])
    mx.eval(found)
    return found


def _product(a: mx.array, b: mx.array) -> mx.array:
    """a b as float32 has it.  GPUs multiply with ten bits of each number: so in two parts each."""
    (a, a_rest), (b, b_rest) = _in_parts(a), _in_parts(b)
    return a @ b + (a @ b_rest + a_rest @ b)


def _in_parts(x: mx.array) -> tuple[mx.array, mx.array]:
    """The first ten bits of each number after its leading one, and the rest."""
    first = (x.view(mx.uint32) & 0xFFFFE000).view(mx.float32)
    return first, x - first
