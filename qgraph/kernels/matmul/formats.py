"""Packed weights decoded by NumPy, for products on the host.

The codes of a byte are looked up at once: several times faster than `mx.dequantize` on CPUs, and
free to run in any thread.  Formats: OCP Microscaling Formats (MX) v1.0 for E2M1, E4M3 and E8M0;
bytes and words are one little-endian stream of bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

_STRADDLING = {3: (3, 8), 5: (5, 8), 6: (3, 4)}
"""Bits whose codes straddle bytes: bytes of one unit, and codes in it."""


@cache
def values(mode: str, bits: int) -> Float32:
    """The number each code stands for, before scale and bias."""
    if mode in ("mxfp4", "nvfp4"):
        half = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        return np.array([*half, *(-v for v in half)], np.float32)
    if mode == "mxfp8":
        return _e4m3()
    return np.arange(2**bits, dtype=np.float32)


@cache
def _e4m3() -> Float32:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    normal = np.where(exponent > 0, mantissa + 8, mantissa)
    magnitude = np.ldexp(normal.astype(np.float32), np.maximum(exponent, 1) - 10)
    magnitude[codes & 127 == 127] = np.nan
    signed: Float32 = np.where(codes & 128, -magnitude, magnitude).astype(np.float32)
    return signed


@cache
def _e8m0() -> Float32:
    scales = np.ldexp(np.float64(1), np.arange(256) - 127)
    scales[255] = np.nan
    return scales.astype(np.float32)


@cache
def _byte_table(mode: str, bits: int) -> npt.NDArray[Any]:
    """For each byte the values of its codes, as one element of that many bytes."""
    each = 8 // bits
    codes = np.arange(256)[:, None] >> (bits * np.arange(each)) & (2**bits - 1)
    whole: npt.NDArray[Any] = values(mode, bits)[codes].view(np.dtype((np.void, 4 * each)))
    return whole.ravel()


def scale_values(scales: npt.NDArray[Any], mode: str) -> Float32:
    """Scales as float32; those of the float modes are codes."""
    if mode == "affine":
        return scales.astype(np.float32, copy=False)
    table = _e4m3() if mode == "nvfp4" else _e8m0()
    return table.take(scales)


def decode(
    w_q: npt.NDArray[np.uint32], scales: Float32, biases: Float32 | None, mode: str, bits: int
) -> Float32:
    """The dense weight, (rows, columns) float32, of some rows of a packed one.

    >>> import mlx.core as mx
    >>> parts = mx.quantize(mx.random.normal((4, 64)), group_size=32, bits=3)
    >>> dense = decode(*map(np.asarray, parts), "affine", 3)
    >>> bool(np.array_equal(dense, mx.dequantize(*parts, group_size=32, bits=3)))
    True
    """
    rows, groups = scales.shape
    data = w_q.view(np.uint8)
    if bits in _STRADDLING:
        dense = _straddling(data, bits)
    else:
        dense = _byte_table(mode, bits).take(data).view(np.float32)
    grouped = dense.reshape(rows, groups, -1)
    grouped *= scales[:, :, None]
    if biases is not None:
        grouped += biases[:, :, None]
    return dense.reshape(rows, -1)


def _straddling(data: npt.NDArray[np.uint8], bits: int) -> Float32:
    size, codes = _STRADDLING[bits]
    units = data.reshape(data.shape[0], -1, size)
    words = np.zeros(units.shape[:2], np.uint64)
    for i in range(size):
        words |= units[:, :, i].astype(np.uint64) << np.uint64(8 * i)
    dense = np.empty((*words.shape, codes), np.float32)
    for j in range(codes):
        dense[:, :, j] = words >> np.uint64(bits * j) & np.uint64(2**bits - 1)
    return dense


def as_numpy(array: mx.array) -> npt.NDArray[Any]:
    """An evaluated array seen without a copy; bfloat16, which NumPy lacks, as float32."""
    if array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)
    mx.eval(array)
    return np.asarray(array)


def address(array: mx.array) -> int:
    """Where in memory the first element of an array lies; evaluates it.

    >>> x = mx.ones((2, 3), mx.bfloat16)
    >>> address(x) == address(x), address(x) == address(x + x)
    (True, False)
    """
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)  # of the same buffer
    mx.eval(array)
    return int(np.asarray(array).__array_interface__["data"][0])
