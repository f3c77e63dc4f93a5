"""Attention of one query a head over the first keys of a cache of fixed size.

As users write it this is `scaled_dot_product_attention` with a mask; MLX has no fused kernel for
array masks on CUDA, where a kernel of our own reads the keys up to a position and no further.  The
source is `cuda/decode_attention.cuh`.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

import mlx.core as mx

from .base import HALF
from .cuda_source import cuda_source

WARPS = 16
HEAD_DIMS = (64, 128)


def decode_attention(
    q: mx.array, k: mx.array, v: mx.array, last: mx.array, scale: float
) -> mx.array:
    """softmax(scale q k^T) v over the keys 0 to `last`.

    Args:
        q: (batch, heads, 1, dim), float16, bfloat16 or float32.
        k, v: (batch, kv_heads, length, dim), of the same dtype; kv_heads divides heads.
        last: an integer of one element.  From length - 1 on all keys are seen; below 0 none is,
            and all weigh the same, as under a mask that hides all of them.

    Returns:
        Like q.  On other devices than CUDA's it is MLX's attention with a mask.

    >>> x = mx.random.normal((1, 2, 4, 64))
    >>> decode_attention(x[:, :, :1], x, x, mx.array(2), 0.125).shape
    (1, 2, 1, 64)
    """
    if not _on_cuda():
        seen = mx.arange(k.shape[2]) <= last.reshape(1)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=seen)
    batch, heads, _, dim = q.shape
    if last.dtype != mx.int32:  # as int32 a number beyond the keys could become negative
        last = mx.minimum(last, mx.array(k.shape[2] - 1, mx.int32)).astype(mx.int32)
    results: list[mx.array] = _kernel()(
        inputs=[q, k, v, last],
        template=[("T", q.dtype), ("D", dim), ("WARPS", WARPS), ("SCALE", _bits(scale))],
        grid=(batch * heads * WARPS * 32, 1, 1),
        threadgroup=(WARPS * 32, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )
    return results[0]


def refusal(q: Any, k: Any, v: Any) -> str | None:
    """Why the kernel does not take values of these shapes and dtypes, or None."""
    if q.shape[2] != 1:
        return f"there are {q.shape[2]} queries a head; the kernel takes one"
    if q.dtype not in (*HALF, mx.float32) or not q.dtype == k.dtype == v.dtype:
        return "query, keys and values must share a floating-point dtype"
    if q.shape[-1] not in HEAD_DIMS or v.shape[-1] != q.shape[-1]:
        return f"heads of {q.shape[-1]}; the kernel takes {HEAD_DIMS}"
    return None


def _on_cuda() -> bool:
    return bool(mx.default_device().type == mx.gpu and mx.cuda.is_available())


def _bits(number: float) -> int:
    """The bits of a float32 as an int, as templates take no floats."""
    return int(struct.unpack("<i", struct.pack("<f", number))[0])


@cache
def _kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="qgraph_decode_attention",
        input_names=["q", "k", "v", "last"],
        output_names=["y"],
        header=cuda_source("decode_attention"),
        source="qgraph::decode_attention<T, D, WARPS, SCALE>("
        "q, k, v, last, y, q_shape[1], k_shape[1], k_shape[2]);",
    )
