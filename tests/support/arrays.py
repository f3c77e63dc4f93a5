"""Between `mx.array` and NumPy, for tests."""

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt


def to_numpy(array: mx.array) -> npt.NDArray[Any]:
    """`array` as a NumPy array of the same values.

    NumPy has no bfloat16, so that one arrives as float32, which holds every
    bfloat16 value exactly.  Other dtypes are kept.

    >>> to_numpy(mx.array([0.5], dtype=mx.bfloat16))
    array([0.5], dtype=float32)
    """
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


def one_buffer(a: mx.array, b: mx.array) -> bool:
    """Are they the same elements in memory?

    >>> one_buffer(mx.ones(3), mx.ones(3))
    False
    """
    places = [np.array(x, copy=False).__array_interface__["data"] for x in (a, b)]
    return bool(places[0] == places[1])
