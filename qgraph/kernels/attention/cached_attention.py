"""One token's attention through a cache: q and k rotated, k and v stored, the keys read.

A decoding step writes this as two `rope`s, two `slice_update`s and an attention, with views between
them.  On CUDA each `slice_update` at a position that is an array is three operations of MLX 0.32,
of which one takes as many threads as the cache has numbers, and copies the cache where the step
before is still under way.  One kernel does it all: see `cached_attention.cuh`.

What it stores in is a copy of the cache, or a tail beside it: see `tail_attention`.
"""

from __future__ import annotations

from functools import cache
from math import log2
from typing import NamedTuple

import mlx.core as mx

from ..cuda.kernel import CudaKernel
from .decode_attention import decode_attention
from .form import (
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
    offset: mx.array | None = None,
    sinks: mx.array | None = None,
    *,
    heads: tuple[Heads, Heads, Heads],
    rope: Rope,
    scale: float,
    window: int = 0,
) -> tuple[mx.array, mx.array, mx.array]:
    """Rotate q and k, put k and v at `position` of the caches, attend to the keys 0 to `last`.

    Args:
        q, k, v: arrays that hold the heads of one token of each batch, of one dtype; they may be
            one array, such as the result of a product for all three.
        keys, values: (batch, kv_heads, length, dim), of the same dtype.
        position: an integer of one element.  Outside the cache nothing is stored.
        last: like `position`; as of `decode_attention`.
        freqs: of `mx.fast.rope`, (dims / 2,), or None with a base in `rope`.
        offset: what q and k are rotated by, where it is not `position`: a ring stores a token in
            the place of one that is forgotten.
        heads: where those of q, k and v lie.
        sinks, scale, window: of `decode_attention`.

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
    if not on_cuda():
        turn = position if offset is None else offset
        token = token_by_mlx(q, k, v, keys.shape, turn, freqs, heads, rope)
        here = (mx.arange(keys.shape[2]) == position.reshape(1))[:, None]
        query, key, value = token
        keys, values = mx.where(here, key, keys), mx.where(here, value, values)
        y = decode_attention(query, keys, values, last, scale, window=window, sinks=sinks)
        return y, keys, values
    y, new_keys, new_values = run_cached(
        (q, k, v, keys, values, position, last), (), (freqs, offset, sinks), heads, rope, scale,
        window,
    )  # fmt: skip
    return y, new_keys, new_values


def run_cached(
    arrays: tuple[mx.array, ...], tail: tuple[mx.array, ...],
    rest: tuple[mx.array | None, mx.array | None, mx.array | None],
    heads: tuple[Heads, Heads, Heads], rope: Rope, scale: float, window: int,
) -> list[mx.array]:  # fmt: skip
    """The result, and what is after: the caches with the token in them, or the tail.

    Args:
        arrays: q, k, v, keys, values, position, last of `cached_attention`.
        tail: none, or keys, values and positions of `tail_attention`.
        rest: freqs, offset and sinks.
    """
    q, k, v, keys, values, position, last = arrays
    batch, kv_heads, length, dim = keys.shape
    number = heads[0].number
    cut = Cut.of(batch, kv_heads, number // kv_heads, dim, length)
    shape = (batch, number, 1, dim)
    after = tail or (keys, values)
    inputs = [q, k, v, keys, values, *tail, as_position(position.reshape(-1), length),
              as_position(last.reshape(-1), length)]  # fmt: skip
    freqs, offset, sinks = rest
    more = {
        "freqs": None if freqs is None else freqs.astype(mx.float32),
        "offset": None if offset is None else offset.reshape(-1).astype(mx.int32),
        "sinks": sinks,
    }
    given = {name: array for name, array in more.items() if array is not None}
    y, *stored = _kernel(tuple(given), bool(tail), cut.splits == 1)(
        inputs=[*inputs, *given.values()],
        template=[
            ("T", keys.dtype), ("D", dim), ("SCALE", bits_of(scale)), *cut.template,
            ("HEADS", number), ("QUERIES", 1), ("WINDOW", window),
            ("TAIL", tail[0].shape[2] if tail else 1), ("DIMS", rope.dims),
            ("TRADITIONAL", rope.traditional),
            ("BASE", bits_of(log2(rope.base) if rope.base else 0.0)),
            ("ROPE_SCALE", bits_of(rope.scale)),
            *((f"{name}_{what}", getattr(at, what.lower()))
              for name, at in zip("QKV", heads, strict=True) for what in ("START", "STEP")),
        ],
        output_shapes=[part_shape(shape, cut.splits), *(a.shape for a in after)],
        output_dtypes=[part_dtype(keys.dtype, cut.splits), *(a.dtype for a in after)],
        **cut.grid,
    )  # fmt: skip
    return [join_splits(y, shape, keys.dtype, cut.splits, sinks), *stored]


def token_by_mlx(
    q: mx.array, k: mx.array, v: mx.array, shape: tuple[int, ...], offset: mx.array,
    freqs: mx.array | None, heads: tuple[Heads, Heads, Heads], rope: Rope,
) -> list[mx.array]:  # fmt: skip
    """The query, the key and the value, (batch, heads, 1, dim), turned."""
    batch, _, _, dim = shape

    def taken(x: mx.array, at: Heads) -> mx.array:
        rows = x.reshape(batch, at.step)[:, at.start : at.start + at.number * dim]
        return rows.reshape(batch, at.number, 1, dim)

    def turned(x: mx.array) -> mx.array:
        if not rope.dims:
            return x
        return mx.fast.rope(
            x, rope.dims, traditional=rope.traditional, base=rope.base, scale=rope.scale,
            offset=offset.reshape(()), freqs=freqs,
        )  # fmt: skip

    query, key, value = (taken(x, at) for x, at in zip((q, k, v), heads, strict=True))
    return [turned(query), turned(key), value]


@cache
def _kernel(given: tuple[str, ...], with_tail: bool, alone: bool) -> CudaKernel:
    tail = ["tail_keys", "tail_values", "tail_positions"] if with_tail else []
    after = ["new_keys", "new_values", *["new_positions"] * with_tail]
    nothing = "nullptr"
    freqs, offset, sinks = (name if name in given else "" for name in ("freqs", "offset", "sinks"))
    return CudaKernel(
        name="_".join(["qgraph", "tail" if with_tail else "cached", "attention", *given,
                       *["alone"] * alone]),
        inputs=["q", "k", "v", "keys", "values", *tail, "place", "last", *given],
        outputs=["out", *after],
        header=sources("cached_attention"),
        source="using F = qgraph::Form<T, D, D, TILES, WARPS, TAIL>;\n"
        "__shared__ qgraph::Shared<F> shared;\n"
        + call_text(q="q + Q_START", keys="keys", values="values", last="last", alone=alone,
                    steps="Q_STEP, D, D", sinks=sinks)
        + "const qgraph::Rope rope{DIMS, TRADITIONAL, __int_as_float(BASE), "
        f"__int_as_float(ROPE_SCALE), {freqs or nothing}}};\n"
        "const qgraph::Token<T> token{k + K_START, v + V_START, K_STEP, V_STEP, place, rope, "
        f"{', '.join(tail or [nothing] * 3)}, new_keys, new_values, "
        f"{'new_positions' if with_tail else nothing}, {offset or nothing}}};\n"
        "qgraph::cached_attention<F>(call, token, blockIdx.x, shared);",
    )  # fmt: skip
