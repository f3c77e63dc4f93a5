"""The formats that a weight may have, and the numbers that each can hold.

A group of affine holds scale · code + bias; the others a scale times a float of 4 bits (E2M1) or 8
(E4M3), as the OCP Microscaling Formats v1.0 and MLX have them.  Arrays are NumPy's or MLX's: the
functions here use what both have.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ...quantization.modes import MODES
from ...quantization.repack import pack_codes

Array = Any
"""Of NumPy or of MLX, float32 unless said otherwise."""

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


class Format(NamedTuple):
    """How a weight is stored.

    >>> Format("affine", 4, 64).bits_per_weight(2)
    4.5
    """

    mode: str
    bits: int
    group_size: int

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of `mx.quantize`."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    @property
    def levels(self) -> int:
        """The largest code of affine."""
        return int(2**self.bits - 1)

    def bits_per_weight(self, scale_bytes: int) -> float:
        """With scales and biases, which take `scale_bytes` each in affine and one byte else."""
        each = 2 * scale_bytes if self.mode == "affine" else 1
        return self.bits + 8 * each / self.group_size

    def bytes(self, shape: Sequence[int], scale_bytes: int) -> int:
        """Of a packed weight of this shape."""
        return int(prod(shape) * self.bits_per_weight(scale_bytes) / 8)

    def __str__(self) -> str:
        return f"{self.mode} {self.bits} bits, groups of {self.group_size}"


FORMATS = tuple(
    Format(mode.name, bits, size)
    for mode in MODES.values()
    for bits in sorted(mode.bits)
    for size in sorted(mode.group_sizes)
)
"""All that MLX has."""


class Grid(NamedTuple):
    """What the groups of a weight can hold; `scale` and `bias` broadcast with the weight."""

    format: Format
    scale: Array
    bias: Array

    def nearest(self, x: Array) -> Array:
        """The numbers of the grid that lie nearest to x."""
        return self.at(self.places(x))

    def places(self, x: Array) -> Array:
        """Codes of affine, floats of 4 or 8 bits else: what the scale multiplies."""
        mode = self.format.mode
        if mode == "affine":
            return clip(rint((x - self.bias) / self.scale), 0, self.format.levels)
        x = x / self.scale
        return _e4m3(x) if mode == "mxfp8" else _e2m1(x)

    def at(self, places: Array) -> Array:
        """The numbers at these places."""
        return places * self.scale + self.bias if self.format.mode == "affine" else (
            places * self.scale
        )  # fmt: skip


def of(x: Array) -> Any:
    """The library that an array is of."""
    return mx if isinstance(x, mx.array) else np


def there(array: np.ndarray[Any, Any]) -> Array:
    """Where the methods run: an array of MLX on a GPU, as it is on a CPU, where NumPy is faster."""
    return array if mx.default_device() == mx.cpu else mx.array(array)


def as_numpy(array: mx.array) -> np.ndarray[Any, Any]:
    """In float32, without a copy where there need not be one."""
    return np.array(array.astype(mx.float32), copy=False)


def turned(x: Array) -> Array:
    """The transpose of a matrix, whole in memory: work on a column is then work on a row."""
    return mx.contiguous(x.T) if isinstance(x, mx.array) else np.ascontiguousarray(x.T)


def rint(x: Array) -> Array:
    return mx.round(x) if isinstance(x, mx.array) else np.rint(x)


def clip(x: Array, low: float, high: float) -> Array:
    lib = of(x)
    return lib.minimum(lib.maximum(x, low), high)


def _e2m1(x: Array) -> Array:
    """The nearest floats of one mantissa bit, up to 6."""
    size = abs(x)
    step = of(x).where(size < 2, 0.5, of(x).where(size < 4, 1.0, 2.0))
    return clip(rint(x / step) * step, -6, 6)


def _e4m3(x: Array) -> Array:
    """The nearest floats of three mantissa bits, up to 448."""
    lib = of(x)
    exponent = clip(lib.floor(lib.log2(lib.maximum(abs(x), 2.0**-20))), -6, 8)
    step = lib.exp2(exponent - 3) if lib is np else mx.power(2.0, exponent - 3)
    return clip(rint(x / step) * step, -448, 448)


@cache
def e4m3_values() -> np.ndarray[Any, Any]:
    """The floats of 8 bits from 0 up, in the order of their codes 0 to 126."""
    return np.array(mx.from_fp8(mx.arange(127, dtype=mx.uint8), mx.float32))


def decode_scales(scales: Array, mode: str) -> Array:
    """Scales as they are stored, uint8, in float32."""
    codes = np.asarray(scales)
    if mode == "nvfp4":
        scale: Array = e4m3_values()[codes & 127]
        return scale
    return np.exp2(codes.astype(np.float32) - 127)


def encode_scales(scales: Array, mode: str) -> np.ndarray[Any, Any]:
    """Scales that are numbers of their format, as uint8."""
    codes: Array = np.rint(np.log2(scales)) + 127
    if mode == "nvfp4":
        codes = np.searchsorted(e4m3_values(), scales).clip(0, 126)
    return np.asarray(codes.clip(0, 254), np.uint8)


def packed(
    places: Array, scales: Array, biases: Array, form: Format, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array | None]:
    """A weight as `mx.quantize` gives it.

    Args:
        places: as `Grid.places` gives them, (rows, columns).
        scales, biases: (rows, groups); affine ones are numbers of `dtype`, in which they are kept.
    """
    places, scales = np.asarray(places), np.asarray(scales)
    if form.mode == "affine":
        codes = places.astype(np.uint8)
        kept = mx.array(scales).astype(dtype), mx.array(np.asarray(biases)).astype(dtype)
        return mx.array(pack_codes(codes, form.bits)), *kept
    table = e4m3_values() if form.mode == "mxfp8" else E2M1
    codes = np.searchsorted(table, np.abs(places)).astype(np.uint8)
    codes |= np.signbit(places).astype(np.uint8) << (form.bits - 1)
    words = mx.array(pack_codes(codes, form.bits))
    return words, mx.array(encode_scales(scales, form.mode)), None
