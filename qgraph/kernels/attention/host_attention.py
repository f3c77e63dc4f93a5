"""Attention of the engine of regions (`cpu/attention.cpp`) called from the host, one step alone."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..cpu.header import header
from ..cpu.region import RegionError, Step, dtype_number

Layout = tuple[tuple[int, ...], tuple[int, ...], mx.Dtype]
"""Shape, strides in elements, dtype."""


def host_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    cores: int = 1,
    last: mx.array | None = None,
    first: mx.array | None = None,
    window: int = 0,
    causal: bool = False,
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """softmax(scale q k^T + mask) v, on every core and summed in float32; evaluates its arguments.

    Args:
        q: (batch, heads, queries, dim), float32, float16 or bfloat16.
        k, v: (batch, kv_heads, keys, dim or another); kv_heads divides heads; any float dtype.
        last: position of the last query's last key, one integer or one for each of the batch.  Keys
            beyond it are not read; below 0 none is seen, and all weigh the same.
        first: like it, keys before are hidden (rows padded on the left).
        window: of the keys seen only the last so many; 0 for all.  Wants `last` or `causal`.
        causal: query i sees keys up to i + keys - queries.
        mask: broadcasts to (batch, heads, queries, keys); bool (False hides) or added.
        sinks: (heads,), scores that take part in the sum alone.

    Returns:
        (batch, heads, queries, dim of v), of q's dtype.

    Raises:
        RegionError: the arguments do not fit one another.

    >>> x = mx.ones((1, 2, 4, 64))
    >>> host_attention(x[:, :, :1], x, x, scale=0.125, last=mx.array(2)).shape
    (1, 2, 1, 64)
    """
    if mask is not None:
        mask = mx.broadcast_to(mask, (*q.shape[:3], k.shape[2]))
    arrays = {"q": q, "k": k, "v": v, "last": last, "first": first, "mask": mask, "sinks": sinks}
    given = {name: array for name, array in arrays.items() if array is not None}
    mx.eval(*given.values())
    held = {name: _bits(array) for name, array in given.items()}
    shape = (*q.shape[:3], v.shape[3])
    y = np.empty(shape, _bits(q[:0]).dtype)
    step = _step(
        tuple(
            (name, (a.shape, tuple(s // a.itemsize for s in a.strides), given[name].dtype))
            for name, a in held.items()
        ),
        scale, window, causal,
    )  # fmt: skip
    step.run([y.ctypes.data, *(a.ctypes.data for a in held.values())], cores)
    result = mx.array(y)
    return result.view(mx.bfloat16) if q.dtype == mx.bfloat16 else result


def _bits(array: mx.array) -> npt.NDArray[Any]:
    """Without a copy where its strides allow; bfloat16, which NumPy lacks, as its bits."""
    seen = np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    return seen if all(step >= 0 for step in seen.strides) else np.ascontiguousarray(seen)


@lru_cache(maxsize=256)
def _step(layouts: tuple[tuple[str, Layout], ...], scale: float, window: int, causal: bool) -> Step:
    """Arrays: y, and then those that are given."""
    h = header()
    found = dict(layouts)
    (batch, heads, queries, dim), _, dtype = found["q"]
    (_, kv_heads, keys, _), value_dim = found["k"][0], found["v"][0][3]
    if found["k"][0] != (batch, kv_heads, keys, dim) or found["v"][0][:3] != found["k"][0][:3]:
        raise RegionError(
            f"keys {found['k'][0]} and values {found['v'][0]} do not fit q {found['q'][0]}"
        )
    a = h.Attention(
        batch=batch, heads=heads, kv_heads=kv_heads, queries=queries, keys=keys, dim=dim,
        value_dim=value_dim, scale=scale, window=window, causal=causal,
        y=h.Ref(0, dtype_number(dtype)),
    )  # fmt: skip
    a.y_strides[:] = (heads * queries * value_dim, queries * value_dim, value_dim, 1)
    for name in ("last", "first", "mask", "sinks"):
        setattr(a, name, h.Ref(-1))
    for number, (name, (shape, strides, kind)) in enumerate(layouts, 1):
        setattr(a, name, h.Ref(number, dtype_number(kind)))
        if name in ("last", "first"):
            setattr(a, f"{name}_batch", int(np.prod(shape) > 1))
        elif name != "sinks":
            getattr(a, f"{name}_strides")[:] = strides
    sizes = [_bytes(((batch, heads, queries, value_dim), tuple(a.y_strides), dtype))]
    return Step(h.ATTENTION, a, sizes + [_bytes(layout) for _, layout in layouts])


def _bytes(layout: Layout) -> int:
    """From the first element to the end of the last."""
    shape, strides, dtype = layout
    if 0 in shape:
        return 0
    return int(dtype.size * (1 + sum(s * (n - 1) for s, n in zip(strides, shape, strict=True))))
