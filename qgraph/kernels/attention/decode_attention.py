"""Attention of few queries a head over the keys of a cache of fixed size.

As users write it this is `scaled_dot_product_attention` with a mask.  MLX has no fused kernel for
array masks on CUDA, and none at all on CPUs; kernels of our own read the keys that are seen and no
further: `decode_attention.cuh` and, from the host, `cpu/attention.cpp`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from ..base import HALF
from ..cpu.library import library, missing
from ..cuda.kernel import CudaKernel
from .form import (
    HEAD_DIMS,
    Cut,
    as_position,
    bits_of,
    call_text,
    join_splits,
    on_cuda,
    part_dtype,
    part_shape,
    sources,
)
from .host_attention import host_attention

FAR = 1 << 30
"""A position that no cache has."""
MOST_QUERIES = 16
"""Up to which a kernel that reads keys as they come is worth having on a GPU."""
LEAST_WORK = 50_000
"""Multiplications of queries and keys for which a CPU leaves a compiled stretch: 0.1 ms in MLX."""


def decode_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    last: mx.array,
    scale: float,
    *,
    first: mx.array | None = None,
    window: int = 0,
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """softmax(scale q k^T + mask) v over the keys up to `last`.

    Args:
        q: (batch, heads, queries, dim), float16, bfloat16 or float32.
        k, v: (batch, kv_heads, length, dim or another), of the same dtype; kv_heads divides heads.
        last: position of the last query's last key, an integer of one element or one for each of
            the batch; the query before it sees one key less, and so on.  From length - 1 on all
            keys are seen; a query that sees none weighs all the same, as under a mask that hides
            all of them.
        first: like it, keys before are hidden (rows padded on the left).
        window: of the keys seen only the last so many; 0 for all.
        mask: broadcasts to (batch, heads, queries, length); bool (False hides) or added.
        sinks: (heads,), of q's dtype: scores that take part in the sum alone.

    Returns:
        (batch, heads, queries, dim of v), of q's dtype.  On other devices than CUDA's it is MLX's
        attention with a mask.

    >>> x = mx.random.normal((1, 2, 4, 64))
    >>> decode_attention(x[:, :, :1], x, x, mx.array(2), 0.125).shape
    (1, 2, 1, 64)
    """
    if not on_cuda():
        return _by_mlx(q, k, v, last, scale, first, window, mask, sinks)
    batch, heads, queries, dim = q.shape
    _, kv_heads, length, value_dim = v.shape
    cut = Cut.of(batch, kv_heads, heads // kv_heads * queries, max(dim, value_dim), length)
    given = {"last": as_position(last.reshape(-1), FAR)}
    if first is not None:
        given["first"] = as_position(first.reshape(-1), FAR)
    if mask is not None:
        given["mask"] = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    if sinks is not None:
        given["sinks"] = sinks
    shape = (batch, heads, queries, value_dim)
    (y,) = _kernel(tuple(given), cut.splits == 1)(
        inputs=[q, k, v, *given.values()],
        template=[
            ("T", q.dtype), ("D", dim), ("DV", value_dim), *cut.template, ("HEADS", heads),
            ("QUERIES", queries), ("WINDOW", window), ("SCALE", bits_of(scale)),
            *([] if mask is None else [("M", mask.dtype)]),
        ],
        output_shapes=[part_shape(shape, cut.splits)],
        output_dtypes=[part_dtype(q.dtype, cut.splits)],
        **cut.grid,
    )  # fmt: skip
    return join_splits(y, shape, q.dtype, cut.splits, sinks)


def _by_mlx(
    q: mx.array, k: mx.array, v: mx.array, last: mx.array, scale: float, first: mx.array | None,
    window: int, mask: mx.array | None, sinks: mx.array | None,
) -> mx.array:  # fmt: skip
    queries, length = q.shape[2], k.shape[2]
    at = mx.arange(length)
    last = last.reshape(-1, 1, 1, 1)
    if queries > 1:
        last = as_position(last, FAR) + (mx.arange(queries) - (queries - 1))[:, None]
    seen = at <= last
    if window:
        seen = seen & (as_position(last, FAR) - window < at)
    if first is not None:
        seen = seen & (first.reshape(-1, 1, 1, 1) <= at)
    if mask is not None and mask.dtype == mx.bool_:
        seen = seen & mask
    elif mask is not None:
        none = ~mx.any(seen, axis=-1, keepdims=True)
        hidden = mx.where(none, mx.array(0, mask.dtype), mx.array(-mx.inf, mask.dtype))
        seen = mx.where(seen, mask, hidden).astype(q.dtype)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=seen, sinks=sinks)


def attention_on_host(
    q: mx.array, k: mx.array, v: mx.array, last: mx.array, scale: float, cores: int, **more: Any
) -> mx.array:
    """`decode_attention` on a CPU, summed in float32; evaluates what it is given.

    >>> x = mx.random.normal((1, 2, 4, 64))
    >>> attention_on_host(x[:, :, :1], x, x, mx.array(2), 0.125, 1).shape
    (1, 2, 1, 64)
    """
    if library() is None:
        return decode_attention(q, k, v, last, scale, **more)
    return host_attention(q, k, v, scale=scale, last=last, cores=cores, **more)


def refusal(q: Any, k: Any, v: Any, backend: str) -> str | None:
    """Why the backend's kernel does not take values of these shapes and dtypes, or None."""
    if q.dtype not in (*HALF, mx.float32) or not q.dtype == k.dtype == v.dtype:
        return "query, keys and values must share a floating-point dtype"
    queries, dim, value_dim = q.shape[2], q.shape[-1], v.shape[-1]
    if backend != "cpu":
        if queries > MOST_QUERIES:
            return f"there are {queries} queries a head; the kernel takes {MOST_QUERIES}"
        if dim not in HEAD_DIMS or value_dim not in HEAD_DIMS:
            return f"heads of {dim} and {value_dim}; it takes {HEAD_DIMS}"
        return None
    if reason := missing():
        return reason
    if queries != 1:
        return f"there are {queries} queries a head; from the host it takes one"
    if q.shape[0] * q.shape[1] * k.shape[2] * dim < LEAST_WORK:
        return "it is too small to leave the compiled stretch for"
    return None


@cache
def _kernel(given: tuple[str, ...], alone: bool) -> CudaKernel:
    mask = "M" if "mask" in given else "void"
    return CudaKernel(
        name="_".join(["qgraph_decode_attention", *given, *["alone"] * alone]),
        inputs=["q", "k", "v", *given],
        outputs=["out"],
        header=sources(),
        source=f"using F = qgraph::Form<T, D, DV, TILES, WARPS, 0, {mask}>;\n"
        "__shared__ qgraph::Shared<F> shared;\n"
        + call_text(q="q", keys="k", values="v", alone=alone, **{name: name for name in given})
        + "qgraph::decode_attention<F>(call, blockIdx.x, shared);",
    )
