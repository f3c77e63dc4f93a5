"""Quantization in NumPy float64, written from the formats' descriptions; imports no MLX.

Sources:

- OCP Microscaling Formats (MX) Specification v1.0, 2023: MXFP8 and MXFP4 in blocks of 32,
  E4M3 and E2M1 elements, the E8M0 scale; conversion in section 6.3.
- OCP 8-bit Floating Point Specification (OFP8) v1.0, 2023: E4M3.
- NVFP4: NVIDIA's description, E2M1 elements in blocks of 16 with an E4M3 scale each; without
  the float32 scale per tensor, which MLX leaves out by default.
- affine: the documentation of `mlx.core.quantize`, and the edge rule that it does not mention,
  given at `quantize` below.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

FLOAT_MODES = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}  # group size, bits


class Quantized(NamedTuple):
    """Packed codes (uint32), scales and biases; in the order of `mx.quantize`."""

    w_q: npt.NDArray[np.uint32]
    scales: Array
    biases: Float64 | None


def unpack(w_q: Array, bits: int) -> npt.NDArray[np.uint8]:
    """Codes of `bits` bits each, (..., K), from uint32 words, (..., K * bits / 32).

    The words are one little-endian stream of bits, which covers widths that divide 32 and
    widths (3, 5, 6) whose codes straddle bytes and words alike.

    >>> unpack(np.array([0x76543210], dtype=np.uint32), 4)
    array([0, 1, 2, 3, 4, 5, 6, 7], dtype=uint8)
    """
    stream = np.ascontiguousarray(w_q, dtype="<u4").view(np.uint8)
    digits = np.unpackbits(stream, axis=-1, bitorder="little")
    digits = digits.reshape(*digits.shape[:-1], -1, bits)
    padding = [(0, 0)] * (digits.ndim - 1) + [(0, 8 - bits)]
    return np.packbits(np.pad(digits, padding), axis=-1, bitorder="little")[..., 0]


def pack(codes: Array, bits: int) -> npt.NDArray[np.uint32]:
    """The inverse of `unpack`; K * bits must be a multiple of 32.

    >>> hex(pack(np.arange(8), 4)[0])
    '0x76543210'
    """
    digits = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, bitorder="little")
    stream = digits[..., :bits].reshape(*codes.shape[:-1], -1)
    words: npt.NDArray[np.uint32] = np.packbits(stream, axis=-1, bitorder="little").view("<u4")
    return words


def decode_float(codes: Array, exponent_bits: int, mantissa_bits: int) -> Float64:
    """Values of a small float format: sign, exponent, mantissa; subnormals; no infinities.

    >>> decode_float(np.arange(8), 2, 1)
    array([0. , 0.5, 1. , 1.5, 2. , 3. , 4. , 6. ])
    """
    codes = codes.astype(np.int64)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = codes & ((1 << mantissa_bits) - 1)
    significand = np.where(exponent > 0, mantissa + (1 << mantissa_bits), mantissa)
    bias = (1 << (exponent_bits - 1)) - 1
    magnitude = significand * np.exp2(np.maximum(exponent, 1) - bias - mantissa_bits)
    sign = 1.0 - 2.0 * (codes >> (exponent_bits + mantissa_bits))
    values: Float64 = sign * magnitude
    return values


def decode_e2m1(codes: Array) -> Float64:
    """FP4 (OCP MX): no infinities, no NaN, at most 6."""
    return decode_float(codes, 2, 1)


def decode_e4m3(codes: Array) -> Float64:
    """FP8 (OCP OFP8): no infinities, S.1111.111 is NaN, at most 448."""
    return np.where((codes & 0x7F) == 0x7F, np.nan, decode_float(codes, 4, 3))


def decode_e8m0(codes: Array) -> Float64:
    """A power of two (OCP MX): 2 ** (code - 127); 255 is NaN.

    >>> decode_e8m0(np.array([126, 127, 128]))
    array([0.5, 1. , 2. ])
    """
    power = np.ldexp(1.0, codes.astype(np.int64) - 127)
    return np.where(codes == 255, np.nan, power)


E2M1_MAGNITUDES = decode_e2m1(np.arange(8))
E4M3_MAGNITUDES = decode_e4m3(np.arange(127))


def encode_nearest(x: Array, magnitudes: Float64, ties: str = "even") -> npt.NDArray[np.uint8]:
    """Codes of the nearest representable values, saturating; sign in the bit above the rest.

    A code less its sign is an index into `magnitudes`, so an even code has an even mantissa.
    `ties` is "even", as the specifications ask, or "zero".
    """
    midpoints = (magnitudes[1:] + magnitudes[:-1]) / 2
    low, high = (np.searchsorted(midpoints, np.abs(x), side) for side in ("left", "right"))
    codes = low if ties == "zero" else np.where(low % 2 == 0, low, high)
    sign_bit = 1 << (len(magnitudes) - 1).bit_length()
    sign = np.where(np.signbit(x), sign_bit, 0)
    return (codes | sign).astype(np.uint8)


def round_to(x: Array, dtype: str) -> Float64:
    """`x` as float64 with every value rounded to `dtype`, by way of float32 as MLX's CPU does."""
    if dtype == "float64":
        return np.asarray(x, dtype=np.float64)
    single: Array = np.asarray(x).astype(np.float32)
    if dtype == "bfloat16":
        word: Array = single.view(np.uint32)
        single = ((word + 0x7FFF + ((word >> 16) & 1)) & 0xFFFF0000).view(np.float32)
    elif dtype == "float16":
        single = single.astype(np.float16).astype(np.float32)
    return single.astype(np.float64)


def quantize(
    w: Array,
    group_size: int = 64,
    bits: int = 4,
    mode: str = "affine",
    *,
    dtype: str = "float64",
    rule: str = "mlx",
) -> Quantized:
    """Quantizes finite `w`, (..., K), in groups along the last axis.

    `dtype` "float64" is the rule in exact arithmetic; "float32", "float16" or "bfloat16" rounds
    after each step as MLX's CPU does for a `w` of that dtype, to be compared bit for bit.

    `rule` chooses how the float modes encode: "mlx", or "spec", the published conversion.  They
    differ in the E8M0 exponent and in ties (`_quantize_float`).

    Affine: with n = 2**bits - 1 and the edge being whichever of max and min is larger in
    magnitude, the scale (max - min) / n, at least 1e-7, counts away from the edge: negative
    for a max edge.  It is then stretched so that zero falls on a code, edge / rint(edge / scale),
    and the edge is the bias; if that rint is zero, scale stays and bias is 0.
    """
    groups = np.asarray(w, dtype=np.float64).reshape(*w.shape[:-1], -1, group_size)
    if mode == "affine":
        codes, steps, biases = _quantize_affine(groups, bits, dtype)
        return Quantized(pack(codes.reshape(w.shape), bits), steps[..., 0], biases[..., 0])
    if (group_size, bits) != FLOAT_MODES[mode]:
        raise ValueError(
            f"{mode} has groups and bits {FLOAT_MODES[mode]}, not {group_size}, {bits}"
        )
    codes, scales = _quantize_float(groups, mode, dtype, rule)
    return Quantized(pack(codes.reshape(w.shape), bits), scales[..., 0], None)


def _quantize_affine(groups: Float64, bits: int, dtype: str) -> tuple[Array, Float64, Float64]:
    # MLX computes in float32 whatever the dtype of w, and only stores in that dtype.
    step = dtype if dtype == "float64" else "float32"
    n = float((1 << bits) - 1)
    high, low = groups.max(axis=-1, keepdims=True), groups.min(axis=-1, keepdims=True)
    low_edge = np.abs(low) > np.abs(high)
    spread = round_to(round_to(high - low, step) / n, step)
    scale = np.maximum(spread, round_to(np.array(1e-7), step)) * np.where(low_edge, 1, -1)
    edge = np.where(low_edge, low, high)
    steps = np.rint(round_to(edge / scale, step))
    moved = steps != 0
    scale = np.where(moved, round_to(edge / np.where(moved, steps, 1.0), step), scale)
    bias = np.where(moved, edge, 0.0)
    codes = np.rint(round_to(round_to(groups - bias, step) / scale, step))
    return np.clip(codes, 0, n), round_to(scale, dtype), round_to(bias, dtype)


def _quantize_float(
    groups: Float64, mode: str, dtype: str, rule: str
) -> tuple[Array, npt.NDArray[np.uint8]]:
    """Codes and uint8 scales of a float mode.

    The E8M0 exponent is, by OCP MX 6.3, floor(log2(amax)) less the exponent of the largest
    element value, so that elements above `largest` saturate; MLX takes
    ceil(log2(amax / largest)), so that none does.  A group of zeros gets 1.0.
    Elements round to nearest: E4M3 ties to even in both; E2M1 ties to even in the
    specification, towards zero in MLX, which has no negative zero either.
    """
    magnitudes = E4M3_MAGNITUDES if mode == "mxfp8" else E2M1_MAGNITUDES
    amax = np.abs(groups).max(axis=-1, keepdims=True)
    largest = magnitudes[-1]
    ratio = round_to(amax / largest, dtype)
    if mode == "nvfp4":
        scales = encode_nearest(ratio, E4M3_MAGNITUDES)
        scale = decode_e4m3(scales)
    else:
        positive = (amax if rule == "spec" else ratio) > 0
        if rule == "spec":
            # frexp's exponent is floor(log2) + 1, exactly
            exponent = np.frexp(amax)[1] - np.frexp(largest)[1]
        else:
            # the ratio is in the dtype of w, its logarithm in float32
            step = dtype if dtype == "float64" else "float32"
            exponent = np.ceil(round_to(np.log2(np.where(positive, ratio, 1.0)), step))
        exponent = np.clip(np.where(positive, exponent, 0), -127, 127).astype(np.int64)
        scales = (exponent + 127).astype(np.uint8)
        scale = decode_e8m0(scales)
    empty = scale == 0
    elements = np.where(empty, 0.0, round_to(groups / np.where(empty, 1.0, scale), dtype))
    if rule == "mlx" and mode != "mxfp8":
        codes = encode_nearest(elements, magnitudes, ties="zero")
        return np.where(codes == 8, 0, codes), scales
    return encode_nearest(elements, magnitudes), scales


def dequantize(
    w_q: Array,
    scales: Array,
    biases: Array | None = None,
    group_size: int = 64,
    bits: int = 4,
    mode: str = "affine",
) -> Float64:
    """The dense weight, (..., K), in float64, exactly what the format says.

    `scales` are numbers for affine, code * scale + bias; uint8 codes for the other modes.
    """
    codes = unpack(w_q, bits)
    groups = codes.reshape(*codes.shape[:-1], -1, group_size)
    if mode == "affine":
        if biases is None:
            raise ValueError("affine needs biases")
        scale = scales.astype(np.float64)[..., None]
        values = groups * scale + biases.astype(np.float64)[..., None]
    else:
        elements = decode_e4m3(groups) if mode == "mxfp8" else decode_e2m1(groups)
        scale = decode_e4m3(scales) if mode == "nvfp4" else decode_e8m0(scales)
        values = elements * scale[..., None]
    return values.reshape(codes.shape)


def quantized_matmul(
    x: Array,
    w_q: Array,
    scales: Array,
    biases: Array | None = None,
    transpose: bool = True,
    group_size: int = 64,
    bits: int = 4,
    mode: str = "affine",
) -> Float64:
    """`x @ w.T`, or `x @ w` without `transpose`, in float64; batch axes broadcast."""
    w = dequantize(w_q, scales, biases, group_size, bits, mode)
    return _matmul(x.astype(np.float64), w, transpose)


def gather_qmm(
    x: Array,
    w_q: Array,
    scales: Array,
    biases: Array | None = None,
    lhs_indices: Array | None = None,
    rhs_indices: Array | None = None,
    transpose: bool = True,
    group_size: int = 64,
    bits: int = 4,
    mode: str = "affine",
) -> Float64:
    """Products of the chosen matrices, in float64, (*indices, M, N).

    Indices count the flattened batch axes of `x` and of `w`, and broadcast against each other;
    without them every matrix is taken in order.
    """
    w = dequantize(w_q, scales, biases, group_size, bits, mode)
    left, right = _gather(x.astype(np.float64), lhs_indices), _gather(w, rhs_indices)
    return _matmul(left, right, transpose)


def _matmul(x: Float64, w: Float64, transpose: bool) -> Float64:
    product: Float64 = x @ (w.swapaxes(-1, -2) if transpose else w)
    return product


def _gather(matrices: Float64, indices: Array | None) -> Float64:
    if indices is None:
        return matrices
    return matrices.reshape(-1, *matrices.shape[-2:])[indices]


def relative_error(actual: Array, expected: Array) -> float:
    """Frobenius norm of the difference over that of `expected`; absolute if that is zero.

    >>> relative_error(np.array([0.0, 3.0]), np.array([0.0, 4.0]))
    0.25
    """
    difference = np.linalg.norm((actual.astype(np.float64) - expected).ravel())
    norm = np.linalg.norm(np.asarray(expected, dtype=np.float64).ravel())
    return float(difference / norm) if norm > 0 else float(difference)
