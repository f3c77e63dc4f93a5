"""Random bits of any number and width: MLX has no function for them, so they are computed here.

The generator is Threefry 2x32 with 20 rounds (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers:
As Easy as 1, 2, 3, 2011).  What it counts follows MLX: of the `n` 32-bit words for a key, word `i`
and word `i + ceil(n / 2)` are the two halves of one block; the middle word of an odd number comes
from a block of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..tracing.functions import FUNCTIONS as F
from ..types import TensorType

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def random_bits(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`RandomBits`: keys of shape (..., 2), then for each of them bits of the rest of the shape."""
    keys, out = i[0], o[0]
    count = math.prod(out.shape[keys.ndim - 1 :])
    words = -(-count * out.dtype.size // 4)
    if keys.ndim == 1 and out.dtype == mx.uint32 and words % 2 == 0 and words:
        return F["reshape"](F["random.split"](keys, words // 2), out.shape)
    flat = F["reshape"](keys, (-1, 2))
    drawn = F["view"](_words(flat, words), out.dtype)
    return F["reshape"](F["getitem"](drawn, (slice(None), slice(0, count))), out.shape)


def _words(keys: Any, count: int) -> Any:
    """`count` words for each row of `keys`."""
    half, odd = divmod(count, 2)
    first = mx.arange(half + odd, dtype=mx.uint32)
    second = mx.arange(half + odd, 2 * (half + odd), dtype=mx.uint32)
    if odd:
        second[half] = 0
    a, b = (F["getitem"](keys, (slice(None), slice(k, k + 1))) for k in (0, 1))
    low, high = _threefry(a, b, first, second)
    upper = F["getitem"](high, (slice(None), slice(0, half)))
    return F["concatenate"]([low, upper], 1)


def _threefry(a: Any, b: Any, x: Any, y: Any) -> tuple[Any, Any]:
    def number(value: int) -> mx.array:
        return mx.array(value, mx.uint32)

    key = (a, b, F["bitwise_xor"](F["bitwise_xor"](a, b), number(_PARITY)))
    x, y = F["add"](x, a), F["add"](y, b)
    for block in range(5):
        for turn in _ROTATIONS[block % 2]:
            x = F["add"](x, y)
            left, right = number(turn), number(32 - turn)
            y = F["bitwise_or"](F["left_shift"](y, left), F["right_shift"](y, right))
            y = F["bitwise_xor"](y, x)
        x = F["add"](x, key[(block + 1) % 3])
        y = F["add"](F["add"](y, key[(block + 2) % 3]), number(block + 1))
    return x, y
