"""Primitives that arrive whole on GPUs, where on CPUs their parts do.

What their arguments are is the `state()` of each in MLX's `fast_primitives.h` and `primitives.h`,
without the fallback, which the export leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..tracing.functions import FUNCTIONS as F
from ..types import TensorType

MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


def _settings(a: Sequence[Any]) -> dict[str, Any]:
    return {"group_size": a[0], "bits": a[1], "mode": MODES[a[2]]}


def quantize(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`Quantize`: group size, bits, mode, and whether it is the way back."""
    settings = _settings(a)
    affine = settings["mode"] == "affine"
    if a[3]:
        w, scales, *rest = i
        extra = {"biases" if affine else "global_scale": rest[0]} if rest else {}
        return F["dequantize"](w, scales, **extra, **settings, dtype=o[0].dtype)
    extra = {"global_scale": i[1]} if len(i) > 1 else {}
    return F["quantize"](i[0], **settings, **extra)


def quantized_matmul(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`QuantizedMatmul`: as `Quantize`, and whether the weight is transposed."""
    return F["quantized_matmul"](*i, transpose=a[3], **_settings(a))


def gather_qmm(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`GatherQMM`: as `QuantizedMatmul`, and which side's indices are sorted."""
    return F["gather_qmm"](*i[:-2], transpose=a[3], **_settings(a), **sorted_side(a, i))


def sorted_side(a: Sequence[Any], i: Sequence[Any]) -> dict[str, Any]:
    """Indices of a gathered product: MLX keeps the flag only where one side alone is given."""
    left, right = a[-2:]
    if right:
        return {"rhs_indices": i[-1], "sorted_indices": True}
    if left:
        return {"lhs_indices": i[-2], "sorted_indices": True}
    return {"lhs_indices": i[-2], "rhs_indices": i[-1]}


def _given(weight: Any) -> Any:
    """Norms without a weight are handed over with a number in its place."""
    return None if weight.ndim == 0 else weight


def rms_norm(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`RMSNorm`: eps."""
    return F["fast.rms_norm"](i[0], _given(i[1]), a[0])


def layer_norm(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`LayerNorm`: eps."""
    return F["fast.layer_norm"](i[0], _given(i[1]), _given(i[2]), a[0])


def _mean(x: Any) -> Any:
    return F["mean"](x, -1, True)


def _over_rows(x: Any, like: Any) -> Any:
    """The sum over all but the last axis, or a zero for a weight that is none."""
    if like.ndim == 0:
        return F["zeros_like"](like)
    return F["sum"](x, tuple(range(x.ndim - 1)))


def rms_norm_gradient(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`RMSNormVJP`: gradients of x and of the weight for that of the result.

    With n = 1 / sqrt(mean(x^2) + eps) and the result x n w: dx = n (g w - x n^2 mean(g w x)).
    """
    x, w, g = i
    n = F["rsqrt"](_mean(F["square"](x)) + a[0])
    gw = g * w
    return [n * (gw - x * F["square"](n) * _mean(gw * x)), _over_rows(g * x * n, w)]


def layer_norm_gradient(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`LayerNormVJP`: gradients of x, weight and bias for that of the result.

    With c = x - mean(x), n = 1 / sqrt(mean(c^2) + eps) and the result c n w + b:
    dx = n (g w - mean(g w) - c n^2 mean(g w c)).
    """
    x, w, b, g = i
    c = x - _mean(x)
    n = F["rsqrt"](_mean(F["square"](c)) + a[0])
    gw = g * w
    dx = n * (gw - _mean(gw) - c * F["square"](n) * _mean(gw * c))
    return [dx, _over_rows(g * c * n, w), _over_rows(g, b)]


def rope(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`RoPE`: dims, traditional, base, scale, and whether it turns forward, not in a gradient."""
    dims, traditional, base, scale, forward = a
    freqs = i[2] if len(i) > 2 else None
    x = i[0] if forward else i[0] * _mirror(x_type := i[0].value.type, dims, traditional)
    turned = F["fast.rope"](
        x, dims, traditional=traditional, base=None if freqs is not None else base, scale=scale,
        offset=i[1], freqs=freqs,
    )  # fmt: skip
    return turned if forward else turned * _mirror(x_type, dims, traditional)


def _mirror(x: TensorType, dims: int, traditional: bool) -> mx.array:
    """-1 for the second of each pair: turning back is turning between two mirrors."""
    signs = [1.0] * x.shape[-1]
    for d in range(1, dims, 2) if traditional else range(dims // 2, dims):
        signs[d] = -1.0
    return mx.array(signs, x.dtype)


def attention(i: Sequence[Any], a: Sequence[Any], o: Sequence[TensorType]) -> Any:
    """`ScaledDotProductAttention`: scale, causal, has sinks, for training, only the fused kernel.

    Inputs are q, k, v, a mask unless it is causal or none, and sinks.
    """
    scale, causal, has_sinks, for_training, fused = a
    if for_training or len(o) > 1:
        raise NotImplementedError("attention inside a gradient also gives its log-sum-exp")
    q, k, v, *rest = i
    extra = {"sinks": rest.pop()} if has_sinks else {}
    if fused:
        extra["force_fused"] = True
    mask = "causal" if causal else rest[0] if rest else None
    name = "fast.scaled_dot_product_attention"
    return F[name](q, k, v, scale=scale, mask=mask, **extra)
