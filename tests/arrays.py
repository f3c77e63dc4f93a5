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
