"""Is what a program gives what the model gives?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .kind import Kind

TOLERANCE = 1e-3
HALF_TOLERANCE = 6e-2
"""Of the root of the mean square; products in half precision differ by how they are summed up."""


@dataclass(frozen=True)
class Difference:
    """Where a program's results part from the model's.

    Attributes:
        where: the layer.
        size: of the difference, relative to what the model gives.
        final: is it beyond what rounding explains?  In half precision a router may choose another
            expert, so that one call alone says little.
    """

    where: str
    size: float
    final: bool

    def __str__(self) -> str:
        return f"its results part from the model's at {self.where} (by {self.size:.1%})"


def compared(
    kinds: Sequence[Kind], caches: Any, logits: mx.array, after: Any, expected: mx.array
) -> Difference | None:
    """The first difference that is too large, layer by layer and then of the logits."""
    half = expected.dtype != mx.float32
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    for layer, (kind, mine, right) in enumerate(zip(kinds, caches, after, strict=True)):
        if kind.is_empty(right) and not kind.content(right):
            continue
        pairs = zip(kind.content(mine), kind.content(right), strict=True)
        size = max((_distance(a, b) for a, b in pairs), default=0.0)
        if not size <= tolerance:
            return Difference(f"layer {layer}", size, not half)
    size = _distance(logits[:, -1], expected[:, -1])
    return None if size <= tolerance else Difference("the logits", size, not half)


def _distance(a: mx.array, b: mx.array) -> float:
    """The root of the mean square of a - b, relative to that of b."""
    if a.shape != b.shape:
        return float("inf")
    if not b.size:
        return 0.0
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    same = (a == b) | (mx.isnan(a) & mx.isnan(b))  # infinities and what no number is
    apart = mx.where(same, 0, a - b)
    there = mx.where(mx.isfinite(b), b, 0)
    size = mx.sqrt(mx.mean(apart * apart)) / mx.maximum(mx.sqrt(mx.mean(there * there)), 1e-20)
    return float(size.item())
