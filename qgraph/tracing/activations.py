"""Activations that `mlx.nn` has and `mlx.core` has not, as `mlx.nn` computes them.

Those of `mlx.nn` are compiled functions, which take arrays alone.
"""

from __future__ import annotations

import math
from typing import Any

from .functions import FUNCTIONS as F


def relu(x: Any) -> Any:
    """max(x, 0), as `mlx.nn.relu`.

    >>> import mlx.core as mx
    >>> relu(mx.array([-1.0, 2.0]))
    array([0, 2], dtype=float32)
    """
    return F["maximum"](x, 0)


def silu(x: Any) -> Any:
    """x sigmoid(x), as `mlx.nn.silu`.

    >>> import mlx.core as mx
    >>> silu(mx.array([0.0, 2.0]))
    array([0, 1.76159], dtype=float32)
    """
    return x * F["sigmoid"](x)


def gelu(x: Any) -> Any:
    """x times the normal distribution's share below x, as `mlx.nn.gelu`: by erf, not tanh.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv:1606.08415.

    >>> import mlx.core as mx
    >>> gelu(mx.array([0.0, 2.0]))
    array([0, 1.9545], dtype=float32)
    """
    return x * (1 + F["erf"](x / math.sqrt(2))) / 2
