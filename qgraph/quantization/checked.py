"""Quantized ops, and what belongs together in each mode.

The modes are MLX's: `affine` (a scale and a zero point a group), `mxfp4` and `mxfp8` (OCP
Microscaling Formats, v1.0) and `nvfp4` (4-bit floats with an E4M3 scale for 16 of them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import QuantizationError
from ..ir.graph import StreamLike
from ..tracing.tensor import apply


@dataclass(frozen=True, slots=True)
class Mode:
    """What a mode allows; the first bits and group size are its defaults."""

    name: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    has_biases: bool


MODES = {
    "affine": Mode("affine", (4, 2, 3, 5, 6, 8), (64, 32, 128), True),
    "mxfp4": Mode("mxfp4", (4,), (32,), False),
    "mxfp8": Mode("mxfp8", (8,), (32,), False),
    "nvfp4": Mode("nvfp4", (4,), (16,), False),
}
FLOATS = (mx.float16, mx.bfloat16, mx.float32)


def _choices(allowed: tuple[Any, ...]) -> str:
    words = [str(a) for a in sorted(allowed, key=str if isinstance(allowed[0], str) else None)]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def resolve(op: str, group_size: int | None, bits: int | None, mode: str) -> tuple[int, int]:
    """The group size and bits of a call, with the mode's defaults for those left out."""
    if not isinstance(mode, str) or mode not in MODES:
        raise QuantizationError(
            f"{op}: mode={mode!r} is not a mode", hint=f"mode may be {_choices(tuple(MODES))}"
        )
    allowed = MODES[mode]
    group_size = allowed.group_sizes[0] if group_size is None else group_size
    bits = allowed.bits[0] if bits is None else bits
    if type(bits) is not int or bits not in allowed.bits:
        raise QuantizationError(
            f"{op}: bits={bits!r} is not in mode {mode!r}",
            hint=f"bits may be {_choices(allowed.bits)}",
        )
    if type(group_size) is not int or group_size not in allowed.group_sizes:
        raise QuantizationError(
            f"{op}: group_size={group_size!r} is not in mode {mode!r}",
            hint=f"group_size may be {_choices(allowed.group_sizes)}",
        )
    return group_size, bits


def _check_float_weight(op: str, w: Any, group_size: int) -> None:
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
            hint=f"sizes that do: {_choices(tuple(fits))}" if fits else "pad the last axis of w",
        )


def _check_packed(
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


def _call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], stream: StreamLike) -> Any:
    given = {k: v for k, v in kwargs.items() if v is not None}
    return apply(name, args, given, stream)


def quantize(
    w: Any,
    /,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    *,
    global_scale: Any = None,
    stream: StreamLike = None,
) -> Any:
    """Quantize a float tensor along its last axis.

    Args:
        w: float16, bfloat16 or float32 of shape (..., K).
        group_size: elements that share a scale; by default 64 (affine), 32 (mxfp4, mxfp8), 16
            (nvfp4).
        bits: bits an element; by default 4, and 8 for mxfp8.
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4".

    Returns:
        (w_q, scales, biases) for affine, (w_q, scales) else: uint32 of shape (..., K * bits / 32)
        and scales of shape (..., K / group_size), in the dtype of w for affine and uint8 else.

    Raises:
        QuantizationError: bits, group size and shape do not belong together.

    >>> import mlx.core as mx, qgraph as qg
    >>> [part.shape for part in qg.quantize(mx.ones((8, 128)), group_size=64, bits=4)]
    [(8, 16), (8, 2), (8, 2)]
    """
    group_size, bits = resolve("quantize", group_size, bits, mode)
    _check_float_weight("quantize", w, group_size)
    kwargs = dict(group_size=group_size, bits=bits, mode=mode, global_scale=global_scale)
    return _call("quantize", (w,), kwargs, stream)


def dequantize(
    w: Any,
    /,
    scales: Any,
    biases: Any = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    global_scale: Any = None,
    dtype: mx.Dtype | None = None,
    *,
    stream: StreamLike = None,
) -> Any:
    """The dense tensor of a packed one, shape (..., K); see `quantize` for the parts.

    Args:
        dtype: of the result; by default that of affine scales, bfloat16 for the other modes.

    Raises:
        QuantizationError: the parts do not belong together.
    """
    group_size, bits = resolve("dequantize", group_size, bits, mode)
    _check_packed("dequantize", w, scales, biases, group_size, bits, mode)
    kwargs = dict(group_size=group_size, bits=bits, mode=mode, dtype=dtype)
    if global_scale is not None:
        kwargs["global_scale"] = global_scale
    return _call("dequantize", _parts(w, scales, biases), kwargs, stream)


def _parts(w: Any, scales: Any, biases: Any) -> tuple[Any, ...]:
    return (w, scales) if biases is None else (w, scales, biases)


def _packed_operand(
    op: str,
    w: Any,
    scales: Any,
    biases: Any,
    group_size: int,
    bits: int,
    mode: str,
    stream: StreamLike,
) -> tuple[Any, ...]:
    """The packed parts of `w`: as given, or made here of a float one."""
    if scales is not None:
        _check_packed(op, w, scales, biases, group_size, bits, mode)
        return _parts(w, scales, biases)
    if biases is not None:
        raise QuantizationError(
            f"{op}: biases were given without scales",
            hint="biases are the zero points of a packed w; add an output bias to the result",
        )
    if w.dtype == mx.uint32:
        raise QuantizationError(
            f"{op}: w is uint32, a packed weight, but scales are missing",
            hint="give the scales (and, for mode 'affine', the biases) that quantize returned",
        )
    _check_float_weight(op, w, group_size)
    return tuple(apply("quantize", (w,), _settings(group_size, bits, mode), stream))


def _settings(group_size: int, bits: int, mode: str) -> dict[str, Any]:
    return {"group_size": group_size, "bits": bits, "mode": mode}


def _check_inner(op: str, x: Any, parts: tuple[Any, ...], bits: int, transpose: bool) -> None:
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


def _multiply(
    op: str,
    x: Any,
    weight: tuple[Any, Any, Any],
    transpose: bool,
    form: tuple[int | None, int | None, str],
    options: dict[str, Any],
    stream: StreamLike,
) -> Any:
    """Check the parts of a product and call it; `weight` is w, scales, biases."""
    group_size, bits = resolve(op, *form)
    settings = _settings(group_size, bits, form[2])
    parts = _packed_operand(op, *weight, group_size, bits, form[2], stream)
    _check_inner(op, x, parts, bits, transpose)
    return _call(op, (x, *parts), {"transpose": transpose, **settings, **options}, stream)


def quantized_matmul(
    x: Any,
    w: Any,
    scales: Any = None,
    biases: Any = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    *,
    stream: StreamLike = None,
) -> Any:
    """Multiply `x` by a quantized weight, `x @ w.T` (or `x @ w` with `transpose=False`).

    Args:
        x: (..., K), float16, bfloat16 or float32.
        w: packed uint32 (N, K * bits / 32) with `scales`; or a float weight (N, K), which is
            quantized here, by a `quantize` node that the passes hoist.  With `transpose=False`
            the first axis is K and groups run along N.
        scales: (N, K / group_size), as `quantize` returned them.
        biases: the zero points of mode "affine", of the shape of scales; never an output bias.
        group_size: elements that share a scale; by default the mode's (64 for affine).
        bits: bits an element; by default the mode's (4 for affine).
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4".
        stream: "cpu", "gpu", an `mx.Device` or an `mx.Stream` for this call.

    Returns:
        (..., N) in the dtype of x (affine: promoted with that of the scales).

    Raises:
        QuantizationError: the parts do not belong together; names argument, value and choices.

    >>> import mlx.core as mx, qgraph as qg
    >>> x, w = mx.random.normal((4, 64)), mx.random.normal((128, 64))
    >>> automatic = qg.quantized_matmul(x, w, group_size=32)
    >>> packed = qg.quantize(w, group_size=32)
    >>> mx.array_equal(automatic, qg.quantized_matmul(x, *packed, group_size=32)).item()
    True
    """
    form = (group_size, bits, mode)
    return _multiply("quantized_matmul", x, (w, scales, biases), transpose, form, {}, stream)


def gather_qmm(
    x: Any,
    w: Any,
    scales: Any = None,
    biases: Any = None,
    lhs_indices: Any = None,
    rhs_indices: Any = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    *,
    sorted_indices: bool = False,
    stream: StreamLike = None,
) -> Any:
    """`quantized_matmul` with matrices picked by index from batches, as experts are.

    Args:
        x: (..., M, K).
        w: (E, N, K * bits / 32) packed, with scales; or float (E, N, K).
        lhs_indices: which matrices of x; by default each.
        rhs_indices: which of the E weights.
        sorted_indices: the indices given are sorted.

    Raises:
        QuantizationError: the parts do not belong together.
    """
    options = {"lhs_indices": lhs_indices, "rhs_indices": rhs_indices}
    options["sorted_indices"] = sorted_indices or None
    form = (group_size, bits, mode)
    return _multiply("gather_qmm", x, (w, scales, biases), transpose, form, options, stream)
