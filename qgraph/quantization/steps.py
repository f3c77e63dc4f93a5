"""How far `dequantize(quantize(w))` may be from w: at most a step of its group."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

GAPS = {"mxfp4": 2, "mxfp8": 32, "nvfp4": 2}
"""The widest distance between neighbouring codes, in scales: 4 to 6 in E2M1, 416 to 448 in E4M3."""

_SMALLEST = 2.0**-9
"""Of E4M3.  A scale of nvfp4 may be off by half of it, and its largest code, 6, by 3 of it."""


def steps(scales: mx.array, bits: int, mode: str) -> mx.array:
    """The largest error that rounding in each group may make, float32 in the shape of `scales`.

    An affine scale is itself rounded to its dtype, and the largest code multiplies what that loses.

    >>> import mlx.core as mx
    >>> steps(mx.array([127, 128], dtype=mx.uint8), 4, "mxfp4").tolist()
    [2.0, 4.0]
    """
    if mode == "affine":
        size = mx.abs(scales.astype(mx.float32))
        least = 2.0**-25 if scales.dtype == mx.float16 else 0.0
        lost = mx.maximum(size * mx.finfo(scales.dtype).eps / 2, least)
        return mx.add(size, lost * (2**bits - 1))
    if mode == "nvfp4":
        size = mx.from_fp8(scales, mx.float32)
    else:
        size = mx.power(mx.array(2.0), scales.astype(mx.float32) - 127)
    return mx.add(GAPS[mode] * size, 3 * _SMALLEST if mode == "nvfp4" else 0.0)


def round_trip(w: mx.array, group_size: int, bits: int, mode: str) -> tuple[mx.array, float]:
    """`dequantize(quantize(w))` in the dtype of w, and its largest error in steps of the group.

    An error above 1 means that something other than rounding happened to the weight.

    >>> import mlx.core as mx
    >>> rounded, error = round_trip(mx.random.normal((8, 64)), 32, 4, "affine")
    >>> rounded.shape, error <= 1
    ((8, 64), True)
    """
    settings: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    parts = mx.quantize(w, **settings)
    rounded = mx.dequantize(*parts, **settings, dtype=w.dtype)
    return rounded, error_in_steps(w, rounded, parts[1], bits, mode)


def error_in_steps(w: mx.array, rounded: mx.array, scales: mx.array, bits: int, mode: str) -> float:
    """The largest distance of `rounded` from `w`, in steps of its group.

    What the dtype of w itself rounds, of products and sums within a group, is not counted.
    """
    groups = (*scales.shape, -1)
    size = mx.abs(w.astype(mx.float32).reshape(groups)).max(axis=-1)
    away = mx.abs((w.astype(mx.float32) - rounded.astype(mx.float32)).reshape(groups)).max(axis=-1)
    slack = 4 * mx.finfo(w.dtype).eps * size
    found = mx.maximum(away - slack, 0) / mx.maximum(steps(scales, bits, mode), 1e-30)
    return float(found.max())
