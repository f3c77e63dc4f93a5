"""Quantized ops: MLX's, with operands that are checked and float weights that are packed here."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..errors import QuantizationError
from ..ir.graph import StreamLike
from ..tracing.tensor import apply
from .modes import resolve
from .operands import check_float_weight, check_inner, check_packed


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
    check_float_weight("quantize", w, group_size)
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
    check_packed("dequantize", w, scales, biases, group_size, bits, mode)
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
        check_packed(op, w, scales, biases, group_size, bits, mode)
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
    check_float_weight(op, w, group_size)
    return tuple(apply("quantize", (w,), _settings(group_size, bits, mode), stream))


def _settings(group_size: int, bits: int, mode: str) -> dict[str, Any]:
    return {"group_size": group_size, "bits": bits, "mode": mode}


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
    check_inner(op, x, parts, bits, transpose)
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
