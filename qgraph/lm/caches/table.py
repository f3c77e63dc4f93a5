"""The table of mlx-lm's caches."""

from __future__ import annotations

from typing import Any

from mlx_lm.models import cache as lm

from .filled import BatchKind, ChunkedKind, FilledKind, QuantizedKind
from .kind import Kind
from .rotating import BatchRotatingKind, RotatingKind
from .states import ArraysKind, ListKind


def kind_of(cache: Any) -> Kind | None:
    """How a cache is handed over; None for one that only its model knows."""
    found = KINDS.get(type(cache))
    if isinstance(found, ListKind) and any(kind_of(c) is None for c in cache.caches):
        return None
    return found


KINDS: dict[type, Kind] = {
    lm.KVCache: FilledKind(),
    lm.BatchKVCache: BatchKind(),
    lm.ChunkedKVCache: ChunkedKind(),
    lm.QuantizedKVCache: QuantizedKind(),
    lm.RotatingKVCache: RotatingKind(),
    lm.BatchRotatingKVCache: BatchRotatingKind(),
    lm.ArraysCache: ArraysKind(),
    lm.CacheList: ListKind(kind_of),
}
