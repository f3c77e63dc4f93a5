"""Ops that `mlx.core` has no function for: methods of `mx.array`, words of the user, kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..kernels.chosen import (
    cached_attention,
    decode_attention,
    merge_tail,
    pack_weight,
    packed_gather,
    packed_matmul,
    packed_rows,
    tail_attention,
)
from ..kernels.collectives import (
    all_gather,
    all_max,
    all_min,
    all_sum,
    join,
    part,
    recv,
    send,
    sum_scatter,
)


def getitem(a: mx.array, index: Any) -> mx.array:
    return a[tuple(index) if isinstance(index, list) else index]


def at_set(a: mx.array, index: Any, updates: Any) -> mx.array:
    result = mx.array(a)
    result[tuple(index) if isinstance(index, list) else index] = updates
    return result


def _at(method: str) -> Callable[..., mx.array]:
    def update(a: mx.array, index: Any, updates: Any) -> mx.array:
        place = a.at[tuple(index) if isinstance(index, list) else index]
        result: mx.array = getattr(place, method)(updates)
        return result

    return update


def keep(x: mx.array) -> mx.array:
    return x


def shard(x: mx.array, axis: int) -> mx.array:
    """`x` itself; on a mesh it is split along `axis`."""
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"shard: axis {axis} of {x.ndim}")
    return x


def replicate(x: mx.array) -> mx.array:
    """`x` itself; on a mesh every rank holds all of it."""
    return x


OWN: dict[str, Callable[..., Any]] = {
    "getitem": getitem,
    "at_set": at_set,
    "keep": keep,
    "cached_attention": cached_attention,
    "decode_attention": decode_attention,
    "tail_attention": tail_attention,
    "merge_tail": merge_tail,
    "pack_weight": pack_weight,
    "packed_matmul": packed_matmul,
    "packed_gather": packed_gather,
    "packed_rows": packed_rows,
    "distributed.all_gather": all_gather,
    "distributed.all_max": all_max,
    "distributed.all_min": all_min,
    "distributed.all_sum": all_sum,
    "distributed.join": join,
    "distributed.part": part,
    "distributed.recv": recv,
    "distributed.send": send,
    "distributed.sum_scatter": sum_scatter,
    "replicate": replicate,
    "shard": shard,
    **{f"at_{m}": _at(m) for m in ("add", "subtract", "multiply", "divide", "maximum", "minimum")},
}
"""By the names that users call them by."""
