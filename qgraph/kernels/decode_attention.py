"""Attention of one query a head over the first keys of a cache of fixed size.

As users write it this is `scaled_dot_product_attention` with a mask.  MLX has no fused kernel for
array masks on CUDA, and none at all on CPUs; kernels of our own read the keys up to a position and
no further: `cuda/decode_attention.cuh` and, from the host, `cpu/attention.cpp`.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from qgraph.tensor import as_int

from .base import HALF
from .cpu_library import attend, missing
from .cuda_source import cuda_source
from .decode import as_numpy

WARPS = 16
HEAD_DIMS = (64, 128)
LEAST_WORK = 50_000
"""Multiplications of queries and keys for which a CPU leaves a compiled stretch: 0.1 ms in MLX."""


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


def attention_on_host(
    q: mx.array, k: mx.array, v: mx.array, last: mx.array, scale: float, cores: int
) -> mx.array:
    """`decode_attention` on a CPU, in float32; evaluates what it is given.

    >>> x = mx.random.normal((1, 2, 4, 64))
    >>> attention_on_host(x[:, :, :1], x, x, mx.array(2), 0.125, 1).shape
    (1, 2, 1, 64)
    """
    function = attend()
    if function is None:
        return decode_attention(q, k, v, last, scale)
    mx.eval(q, k, v, last)
    queries, keys, values = (np.ascontiguousarray(as_numpy(a)) for a in (q, k, v))
    batch, heads, _, dim = queries.shape
    position, length = as_int(last), keys.shape[2]
    y = np.empty_like(queries)
    seen = min(position + 1, length) if position >= 0 else length
    function(
        *(a.ctypes.data for a in (queries, keys, values, y)),
        batch, heads, keys.shape[1], length, dim, seen, scale if position >= 0 else 0.0, cores,
    )  # fmt: skip
    return mx.array(y)


def refusal(q: Any, k: Any, v: Any, backend: str) -> str | None:
    """Why the backend's kernel does not take values of these shapes and dtypes, or None."""
    if q.shape[2] != 1:
        return f"there are {q.shape[2]} queries a head; the kernel takes one"
    if q.dtype not in (*HALF, mx.float32) or not q.dtype == k.dtype == v.dtype:
        return "query, keys and values must share a floating-point dtype"
    dim, same = q.shape[-1], v.shape[-1] == q.shape[-1]
    if backend != "cpu":
        return None if dim in HEAD_DIMS and same else f"heads of {dim}; it takes {HEAD_DIMS}"
    if reason := missing():
        return reason
    if q.dtype != mx.float32:
        return "the kernel for CPUs takes float32"
    if dim % 16 or dim > 256 or not same:
        return f"heads of {dim}; the kernel takes multiples of 16 up to 256"
    if q.shape[0] * q.shape[1] * k.shape[2] * dim < LEAST_WORK:
        return "it is too small to leave the compiled stretch for"
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
