"""Attention of one query a head over the first keys of a cache of fixed size.

As users write it this is `scaled_dot_product_attention` with a mask.  MLX has no fused kernel for
array masks on CUDA, and none at all on CPUs; kernels of our own read the keys up to a position and
no further: `decode_attention.cuh` and, from the host, `cpu/attention.cpp`.
"""

from __future__ import annotations

import struct
from contextvars import ContextVar
from functools import cache
from typing import Any

import mlx.core as mx

from ..base import HALF
from ..cpu.library import library, missing
from ..cuda.source import cuda_source
from .host_attention import host_attention

HEAD_DIMS = (64, 128)
SHARE = 256
"""Keys of one block, where several share a query head."""
BLOCKS = 1056
"""Up to which a GPU gains from sharing: 8 for each of the 132 processors of an H200."""
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
    if not on_cuda():
        seen = mx.arange(k.shape[2]) <= last.reshape(1)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=seen)
    batch, heads, _, dim = q.shape
    last = as_position(last, k.shape[2])
    splits = splits_of(batch * heads, k.shape[2])
    results: list[mx.array] = _kernel()(
        inputs=[q, k, v, last],
        template=[("T", q.dtype), ("D", dim), ("SCALE", bits_of(scale)), *threads(splits)],
        output_shapes=[part_shape(q.shape, splits)],
        output_dtypes=[q.dtype if splits == 1 else mx.float32],
        **grid(batch * heads, splits),
    )
    return join_splits(results[0], q.shape, q.dtype, splits)


def as_position(x: mx.array, length: int) -> mx.array:
    """An integer as int32, to which kernels compare positions: below 0 and beyond stay so.

    >>> [as_position(mx.array(x, mx.int64), 12).item() for x in (-(2**40), 5, 2**40)]
    [-1, 5, 12]
    """
    if x.dtype == mx.int32:
        return x
    first, end = mx.array(0, mx.int32), mx.array(length, mx.int32)
    return mx.where(x >= end, end, mx.where(x < first, first - 1, x.astype(mx.int32)))


def splits_of(heads: int, length: int) -> int:
    """Among how many blocks the keys of a query head are spread; `heads` are those of all batches.

    >>> splits_of(32, 512), splits_of(32, 2048), splits_of(32, 1 << 20), splits_of(2000, 4096)
    (1, 8, 33, 1)
    """
    if length <= 2 * SHARE:
        return 1
    return min(-(-length // SHARE), max(1, BLOCKS // heads))


def threads(splits: int) -> list[tuple[str, int]]:
    """The template arguments SPLITS and WARPS, of a block."""
    return [("SPLITS", splits), ("WARPS", 16 if splits == 1 else 8)]


def grid(heads: int, splits: int) -> dict[str, tuple[int, int, int]]:
    """Threads in all and of a block."""
    block = 32 * dict(threads(splits))["WARPS"]
    return {"grid": (heads * splits * block, 1, 1), "threadgroup": (block, 1, 1)}


def part_shape(shape: tuple[int, ...], splits: int) -> tuple[int, ...]:
    """Of what the blocks of queries of a shape (batch, heads, 1, dim) write."""
    batch, heads, _, dim = shape
    return shape if splits == 1 else (batch * heads * splits, dim + 2)


def join_splits(parts: mx.array, shape: tuple[int, ...], dtype: mx.Dtype, splits: int) -> mx.array:
    """The result, for queries of a shape, of what several blocks a head have written."""
    if splits == 1:
        return parts
    batch, heads, _, dim = shape
    results: list[mx.array] = _joining()(
        inputs=[parts],
        template=[("T", dtype), ("D", dim), ("SPLITS", splits)],
        grid=(batch * heads * dim, 1, 1),
        threadgroup=(dim, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
    )
    return results[0]


def attention_on_host(
    q: mx.array, k: mx.array, v: mx.array, last: mx.array, scale: float, cores: int
) -> mx.array:
    """`decode_attention` on a CPU, summed in float32; evaluates what it is given.

    >>> x = mx.random.normal((1, 2, 4, 64))
    >>> attention_on_host(x[:, :, :1], x, x, mx.array(2), 0.125, 1).shape
    (1, 2, 1, 64)
    """
    if library() is None:
        return decode_attention(q, k, v, last, scale)
    return host_attention(q, k, v, scale=scale, last=last, cores=cores)


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
    if q.shape[0] * q.shape[1] * k.shape[2] * dim < LEAST_WORK:
        return "it is too small to leave the compiled stretch for"
    return None


only_mlx: ContextVar[bool] = ContextVar("only_mlx", default=False)
"""Set where MLX transforms a graph: it knows no gradient of kernels written for CUDA."""


def on_cuda() -> bool:
    """Do kernels for CUDA run on the default device?"""
    on_gpu = mx.default_device().type == mx.gpu and mx.cuda.is_available()
    return bool(on_gpu) and not only_mlx.get()


def bits_of(number: float) -> int:
    """The bits of a float32 as an int, as templates take no floats."""
    return int(struct.unpack("<i", struct.pack("<f", number))[0])


@cache
def _kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="qgraph_decode_attention",
        input_names=["q", "k", "v", "last"],
        output_names=["y"],
        header=cuda_source("attention", "decode_attention"),
        source="qgraph::decode_attention<T, D, WARPS, SPLITS, SCALE>("
        "q, k, v, last, y, q_shape[1], k_shape[1], k_shape[2]);",
    )


@cache
def _joining() -> Any:
    return mx.fast.cuda_kernel(
        name="qgraph_join_splits",
        input_names=["parts"],
        output_names=["y"],
        header=cuda_source("attention", "decode_attention"),
        source="qgraph::join_splits<T, D, SPLITS>(parts, y);",
    )
