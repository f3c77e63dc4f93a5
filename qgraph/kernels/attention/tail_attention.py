"""One token's attention that stores the token in a tail of its cache.

Writing a row into a cache copies the cache wherever MLX cannot know that nobody else holds it: a
kernel of ours never can, and MLX itself cannot while the step before is under way.  So the cache
stays as it is, and new rows go to a tail of a few rows beside it, which is copied with each token
and read after the cache; `merge_tail` puts its rows in their places.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from ..cuda.kernel import CudaKernel
from .cached_attention import Heads, Rope, run_cached, token_by_mlx
from .decode_attention import FAR, decode_attention
from .form import BLOCKS, as_position, on_cuda, sources

MOST_ROWS = 64
"""Of a tail: with each token all of it is copied, and compared with what is read."""
_THREADS = 256


def tail_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    keys: mx.array,
    values: mx.array,
    tail_keys: mx.array,
    tail_values: mx.array,
    tail_positions: mx.array,
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
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """`cached_attention` that stores the token in a tail and leaves the caches as they are.

    Args:
        q, k, v, keys, values, position, last, freqs, offset, sinks, heads, rope, scale, window: of
            `cached_attention`.
        tail_keys, tail_values: (batch, kv_heads, rows, dim), rows that take the place of the
            caches'.
        tail_positions: (rows,), int32: the position that each row has in the caches, -1 where the
            row is not used yet, `FAR` for none.  Those in use come first, a later one of the same
            position counts.  At least one is unused.

    Returns:
        The result and the tail after, its positions last.
    """
    if not on_cuda():
        return _tail_by_mlx(
            q, k, v, keys, values, tail_keys, tail_values, tail_positions, position, last, freqs,
            offset, sinks, heads, rope, scale, window,
        )  # fmt: skip
    tail = (tail_keys, tail_values, tail_positions)
    given, rest = (q, k, v, keys, values, position, last), (freqs, offset, sinks)
    y, *after = run_cached(given, tail, rest, heads, rope, scale, window)
    return y, after[0], after[1], after[2]


def merge_tail(cache: mx.array, tail: mx.array, positions: mx.array) -> mx.array:
    """A cache with the rows of a tail in their places; arguments as of `tail_attention`.

    >>> cache, tail = mx.zeros((1, 1, 4, 64)), mx.ones((1, 1, 2, 64))
    >>> merge_tail(cache, tail, mx.array([2, -1], mx.int32))[0, 0, :, 0].tolist()
    [0.0, 0.0, 1.0, 0.0]
    """
    length, rows = cache.shape[2], tail.shape[2]
    if not on_cuda():
        here = positions == mx.arange(length)[:, None]
        which = rows - 1 - mx.argmax(here[:, ::-1], axis=1)
        return mx.where(mx.any(here, axis=1)[:, None], mx.take(tail, which, axis=2), cache)
    blocks = min(-(-cache.size // (8 * _THREADS)), 8 * BLOCKS)
    results: list[mx.array] = _merging()(
        inputs=[cache, tail, positions],
        template=[("T", cache.dtype), ("D", cache.shape[3]), ("TAIL", rows), ("THREADS", _THREADS)],
        grid=(blocks * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[cache.shape],
        output_dtypes=[cache.dtype],
    )
    return results[0]


def _tail_by_mlx(
    q: mx.array, k: mx.array, v: mx.array, keys: mx.array, values: mx.array, tail_keys: mx.array,
    tail_values: mx.array, tail_positions: mx.array, position: mx.array, last: mx.array,
    freqs: mx.array | None, offset: mx.array | None, sinks: mx.array | None,
    heads: tuple[Heads, Heads, Heads], rope: Rope, scale: float, window: int,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:  # fmt: skip
    turn = position if offset is None else offset
    query, *token = token_by_mlx(q, k, v, keys.shape, turn, freqs, heads, rope)
    here = mx.arange(tail_positions.size) == mx.sum(tail_positions != -1)
    place = as_position(position.reshape(1), keys.shape[2])
    place = mx.where((place >= 0) & (place < keys.shape[2]), place, mx.array(FAR, mx.int32))
    positions = mx.where(here, place, tail_positions)
    tail_keys = mx.where(here[:, None], token[0], tail_keys)
    tail_values = mx.where(here[:, None], token[1], tail_values)
    whole = merge_tail(keys, tail_keys, positions), merge_tail(values, tail_values, positions)
    y = decode_attention(query, *whole, last, scale, window=window, sinks=sinks)
    return y, tail_keys, tail_values, positions


@cache
def _merging() -> CudaKernel:
    return CudaKernel(
        name="qgraph_merge_tail",
        inputs=["cache", "tail", "positions"],
        outputs=["merged"],
        header=sources("cached_attention"),
        source="qgraph::merge_tail<T, D, TAIL, THREADS>(cache, tail, positions, merged, "
        "cache_shape[0] * cache_shape[1], cache_shape[2]);",
    )
