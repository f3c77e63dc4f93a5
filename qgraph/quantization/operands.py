"""What the operands of a quantized op have to be, refused in words where they are not."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..errors import QuantizationError
from .modes import FLOATS, MODES, choices


def check_float_weight(op: str, w: Any, group_size: int) -> None:
    if w.ndim < 2:
        raise QuantizationError(
            f"{op}: w has {w.ndim} axes, shape {tuple(w.shape)}", hint="w needs 2 axes or more"
        )
    if w.dtype not in FLOATS:
        raise QuantizationError(
            f"{op}: w has dtype {w.dtype}",
            hint="w may be float16, bfloat16 or float32, or packed uint32 with its scales",
        )
    if w.shape[-1] % group_size:
        fits = [g for g in (16, 32, 64, 128) if w.shape[-1] % g == 0]
        raise QuantizationError(
            f"{op}: group_size={group_size} does not divide the last axis of w, {w.shape[-1]}",
            hint=f"sizes that do: {choices(tuple(fits))}" if fits else "pad the last axis of w",
        )


def check_packed(
    op: str, w: Any, scales: Any, biases: Any, group_size: int, bits: int, mode: str
) -> int:
    """Check a packed weight; the length of its last axis when unpacked."""
    if w.ndim < 2:
        raise QuantizationError(
            f"{op}: w has {w.ndim} axes, shape {tuple(w.shape)}", hint="w needs 2 axes or more"
        )
    if w.dtype != mx.uint32:
        raise QuantizationError(
            f"{op}: scales were given, but w has dtype {w.dtype}",
            hint="a packed w is uint32; leave scales out and a float w is quantized here",
        )
    columns: int = w.shape[-1] * 32 // bits
    expected = (*w.shape[:-1], columns // group_size)
    if tuple(scales.shape) != expected:
        raise QuantizationError(
            f"{op}: scales have shape {tuple(scales.shape)}",
            hint=f"for w of shape {tuple(w.shape)}, bits={bits} and group_size={group_size} "
            f"scales have shape {expected}",
        )
    if (scales.dtype == mx.uint8) == MODES[mode].has_biases:
        wanted = "float16, bfloat16 or float32" if MODES[mode].has_biases else "uint8"
        raise QuantizationError(
            f"{op}: scales have dtype {scales.dtype}, which is not of mode {mode!r}",
            hint=f"scales of mode {mode!r} are {wanted}",
        )
    if MODES[mode].has_biases and biases is None:
        raise QuantizationError(
            f"{op}: biases are missing", hint="mode 'affine' needs the biases that quantize gave"
        )
    if biases is not None and not MODES[mode].has_biases:
        raise QuantizationError(
            f"{op}: biases were given, but mode {mode!r} has none", hint="leave biases out"
        )
    if biases is not None and tuple(biases.shape) != expected:
        raise QuantizationError(
            f"{op}: biases have shape {tuple(biases.shape)}",
            hint=f"biases have the shape of scales, {expected}",
        )
    return columns


def check_inner(op: str, x: Any, parts: tuple[Any, ...], bits: int, transpose: bool) -> None:
    w = parts[0]
    if x.ndim < 1:
        raise QuantizationError(f"{op}: x has no axes", hint="x needs 1 axis or more")
    if 0 in x.shape or 0 in w.shape:
        empty, shape = ("x", x.shape) if 0 in x.shape else ("w", w.shape)
        raise QuantizationError(
            f"{op}: {empty} has no elements, shape {tuple(shape)}",
            hint="MLX ends the process for empty quantized products; leave it out or use zeros",
        )
    inner = w.shape[-1] * 32 // bits if transpose else w.shape[-2]
    if x.shape[-1] != inner:
        flip = w.shape[-2] if transpose else w.shape[-1] * 32 // bits
        hint = (
            f"transpose={not transpose} would fit"
            if x.shape[-1] == flip
            else (f"x needs a last axis of {inner}")
        )
        raise QuantizationError(
            f"{op}: the last axis of x is {x.shape[-1]}, but with transpose={transpose} "
            f"w multiplies {inner}",
            hint=hint,
        )
