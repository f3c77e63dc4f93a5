"""One token's attention through a cache: q and k rotated, k and v stored, the keys read.

A decoding step writes this as two `rope`s, two `slice_update`s and an attention, with views between
them.  On CUDA each `slice_update` at a position that is an array is three operations of MLX 0.32,
of which one takes as many threads as the cache has numbers.  One kernel does it all: see
`cuda/decode_attention.cuh`.
"""

from __future__ import annotations

from functools import cache
from math import log2
from typing import Any, NamedTuple

import mlx.core as mx

from ..cuda.source import cuda_source
from .decode_attention import (
    as_position,
    bits_of,
    decode_attention,
    grid,
    join_splits,
    on_cuda,
    part_shape,
    splits_of,
    threads,
)


class Heads(NamedTuple):
    """The heads of one token of each batch, within an array.

    Attributes:
        number: heads of a batch, one after the other.
        start: number of the first element of the first batch.
        step: elements between batches.
    """

    number: int
    start: int
    step: int


class Rope(NamedTuple):
    """What `mx.fast.rope` is given but its operands; 0 `dims` turn nothing."""

    dims: int = 0
    traditional: bool = False
    base: float | None = None
    scale: float = 1.0


def cached_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    keys: mx.array,
    values: mx.array,
    position: mx.array,
    last: mx.array,
    freqs: mx.array | None = None,
    *,
    heads: tuple[Heads, Heads, Heads],
    rope: Rope,
    scale: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """Rotate q and k, put k and v at `position` of the caches, attend to the keys 0 to `last`.

    Args:
        q, k, v: arrays that hold the heads of one token of each batch, of one dtype; they may be
            one array, such as the result of a product for all three.
        keys, values: (batch, kv_heads, length, dim), of the same dtype.
        position: an integer of one element.  Outside the cache nothing is stored.
        last: like `position`; as of `decode_attention`.
        freqs: of `mx.fast.rope`, (dims / 2,), or None with a base in `rope`.
        heads: where those of q, k and v lie.
        scale: of the scores.

    Returns:
        The result, (batch, heads, 1, dim), and the caches after.

    >>> x, cache = mx.random.normal((1, 6 * 64)), mx.zeros((1, 1, 16, 64))
    >>> heads = (Heads(4, 0, 384), Heads(1, 256, 384), Heads(1, 320, 384))
    >>> y, keys, values = cached_attention(
    ...     x, x, x, cache, cache, mx.array(3), mx.array(3), heads=heads, rope=Rope(), scale=0.125
    ... )
    >>> y.shape, mx.array_equal(values[0, 0, 3], x[0, 320:]).item()
    ((1, 4, 1, 64), True)
    """
    batch, _, length, dim = keys.shape
    if not on_cuda():
        return _by_mlx(q, k, v, keys, values, position, last, freqs, heads, rope, scale)
    count = batch * heads[0].number
    splits = splits_of(count, length)
    shape = (batch, heads[0].number, 1, dim)
    inputs = [q, k, v, keys, values, *(as_position(x, length) for x in (position, last))]
    y, new_keys, new_values = _kernel(freqs is not None)(
        inputs=inputs if freqs is None else [*inputs, freqs.astype(mx.float32)],
        template=[
            ("T", keys.dtype), ("D", dim), ("SCALE", bits_of(scale)), *threads(splits),
            ("HEADS", heads[0].number), ("DIMS", rope.dims), ("TRADITIONAL", rope.traditional),
            ("BASE", bits_of(log2(rope.base) if rope.base else 0.0)),
            ("ROPE_SCALE", bits_of(rope.scale)),
            *((f"{name}_{what}", getattr(at, what.lower()))
              for name, at in zip("QKV", heads, strict=True) for what in ("START", "STEP")),
        ],
        output_shapes=[part_shape(shape, splits), keys.shape, values.shape],
        output_dtypes=[keys.dtype if splits == 1 else mx.float32, keys.dtype, keys.dtype],
        **grid(count, splits),
    )  # fmt: skip
    return join_splits(y, shape, keys.dtype, splits), new_keys, new_values


def _by_mlx(
    q: mx.array, k: mx.array, v: mx.array, keys: mx.array, values: mx.array, position: mx.array,
    last: mx.array, freqs: mx.array | None, heads: tuple[Heads, Heads, Heads], rope: Rope,
    scale: float,
) -> tuple[mx.array, mx.array, mx.array]:  # fmt: skip
    batch, _, length, dim = keys.shape

    def taken(x: mx.array, at: Heads) -> mx.array:
        rows = x.reshape(batch, at.step)[:, at.start : at.start + at.number * dim]
        return rows.reshape(batch, at.number, 1, dim)

    def turned(x: mx.array) -> mx.array:
        if not rope.dims:
            return x
        return mx.fast.rope(
            x, rope.dims, traditional=rope.traditional, base=rope.base, scale=rope.scale,
            offset=position.reshape(()), freqs=freqs,
        )  # fmt: skip

    queries, key, value = (taken(x, at) for x, at in zip((q, k, v), heads, strict=True))
    here = (mx.arange(length) == position.reshape(1))[:, None]
    keys, values = mx.where(here, turned(key), keys), mx.where(here, value, values)
    return decode_attention(turned(queries), keys, values, last, scale), keys, values


@cache
def _kernel(with_freqs: bool) -> Any:
    freqs = "freqs" if with_freqs else "nullptr"
    return mx.fast.cuda_kernel(
        name=f"qgraph_cached_attention{'_freqs' if with_freqs else ''}",
        input_names=["q", "k", "v", "keys", "values", "place", "last", *["freqs"] * with_freqs],
        output_names=["y", "new_keys", "new_values"],
        header=cuda_source("attention", "decode_attention"),
        source="qgraph::cached_attention<T, D, WARPS, SPLITS, SCALE, DIMS, TRADITIONAL, BASE, "
        "ROPE_SCALE>(q + Q_START, Q_STEP, k + K_START, K_STEP, v + V_START, V_STEP, keys, values, "
        f"place, last, {freqs}, y, new_keys, new_values, HEADS, keys_shape[1], keys_shape[2]);",
    )
