"""GPTQ: columns are rounded one by one, and later columns make up for the error of each.

As in Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv:2210.17323), with the Cholesky factor of the inverse Hessian; a group's scale
is chosen when its first column is reached, from the columns as they are by then.
"""

from __future__ import annotations

import mlx.core as mx

from .formats import Array, Format, Grid, of, turned
from .grids import plain, searched
from .in_turn import in_turn
from .rounded import Rounded


def gptq(w: Array, upper: Array, form: Format, dtype: mx.Dtype, *, search: bool = True) -> Rounded:
    """Round a weight column by column.

    Args:
        w: (rows, columns), float32; NumPy's or MLX's.
        upper: what `factor` gives for the Hessian of the columns, of the same library.
        dtype: of affine scales.
        search: for scales with weighted error instead of MLX's.
    """
    lib, size = of(w), form.group_size
    rest = turned(w) + 0.0
    groups = []
    for start in range(0, w.shape[1], size):
        own, later = slice(start, start + size), slice(start + size, None)
        factors = upper[own, own]
        diagonal = lib.diag(factors)[:, None]
        columns, importance = rest[own].T, diagonal[:, 0] ** -2
        grid = searched(columns, importance, form, dtype) if search else plain(columns, form, dtype)
        one = Grid(form, grid.scale[:, 0], grid.bias[:, 0])
        found, wanted = in_turn(one, rest[own] + 0.0, -(factors / diagonal).T)
        if start + size < w.shape[1]:
            rest[later] -= upper[own, later].T @ ((wanted - one.at(found)) / diagonal)
        groups.append((found, one))
        if lib is mx:
            mx.eval(rest, found, one.scale, one.bias)
    return Rounded.joined(form, groups)
