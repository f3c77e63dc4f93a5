"""Is what a program gives what the model gives?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from math import inf
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from ..caches.kind import Kind
from .shadow import shadow

TOLERANCE = 1e-3
HALF_TOLERANCE = 5e-2
"""Of the root of the mean square.  MLX adds up many products in half precision itself, so that a
program is often nearer to what float32 gives.  Where more parts them float32 decides, by what of
each is furthest from it: in which layer rounding first chooses another expert is chance."""


CHANCE = 5e-2
"""What may part them in float32 because one token of many went to another expert: of two that are
as good as alike, rounding chooses.  512 tokens of qwen3_next parted by 1.2 % in layer 7.  Then the
model is asked how far it parts from itself where its weights are a little different."""


A_LITTLE = 1e-6
"""Relative to each weight.  Up to where an expert was chosen, eight layers of qwen3_next part from
their program as from themselves with a tenth of it."""


@dataclass(frozen=True)
class Difference:
    """Where a program's results part from the model's.

    Attributes:
        where: the layer.
        size: of the difference, relative to what the model gives.
        chance: may it be rounding, which decides now and then which experts a router chooses?
    """

    where: str
    size: float
    chance: bool = False

    def __str__(self) -> str:
        return f"its results part from the model's at {self.where} (by {self.size:.1%})"


Result = tuple[mx.array | None, Sequence[Any]]
"""Logits, where they are compared, and the caches after the call."""


def compared(
    kinds: Sequence[Kind],
    mine: Result,
    right: Result,
    exactly: Callable[[], Result],
    nearly: Callable[[], Result],
) -> Difference | None:
    """The first difference that is too large, layer by layer and then of the logits.

    Args:
        exactly: what the model gives in float32; asked for where half precision differs much.
        nearly: what it gives with weights that are a little different; asked for where float32
            differs by so much as that may do.
    """
    until = next((n for k, c in zip(kinds, right[1], strict=True)
                  if (n := k.until(c)) is not None), None)  # fmt: skip
    ours, theirs = (list(_parts(kinds, result, until)) for result in (mine, right))
    # A state in float32 is made of what was computed in half precision too.
    half = any(array.dtype in (mx.float16, mx.bfloat16) for _, some in theirs for array in some)
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    sizes = ((w, _distance(a, b)) for (w, a), (_, b) in zip(ours, theirs, strict=True))
    parted = next(((where, size) for where, size in sizes if size > tolerance), None)
    if parted is None:
        return None
    chance = half or parted[1] <= CHANCE
    if half:
        truth = list(_parts(kinds, exactly(), until))
        if _furthest(ours, truth) <= 1.2 * _furthest(theirs, truth) + 0.01:
            return None
    elif chance:
        others = list(_parts(kinds, nearly(), until))
        if _is_within(_distances(ours, theirs), _distances(others, theirs)):
            return None
    return Difference(*parted, chance)


Parts = Sequence[tuple[str, list[mx.array]]]


def _distances(some: Parts, others: Parts) -> list[float]:
    return [_distance(a, b) for (_, a), (_, b) in zip(some, others, strict=True)]


def _furthest(some: Parts, others: Parts) -> float:
    return max(_distances(some, others))


def _is_within(mine: Sequence[float], nearly: Sequence[float]) -> bool:
    """Is a program nowhere much further from the model than the model came from itself so far?

    What is chance in one layer is none in the layers before it.

    >>> _is_within([1e-6, 0.01, 0.02], [1e-5, 0.02, 0.01])
    True
    >>> _is_within([0.01, 0.01, 0.01], [1e-5, 0.02, 0.02])
    False
    """
    bounds = accumulate(nearly, max)
    return all(
        own <= max(TOLERANCE, 2 * most) < inf for own, most in zip(mine, bounds, strict=True)
    )


def in_float32(model: Any, tokens: mx.array, cache: Any, own: Callable[..., Any]) -> Result:
    """What the model gives with all its numbers, and those of its caches, in float32."""

    def wide(leaf: Any) -> Any:
        return leaf.astype(mx.float32) if _is_float(leaf) else leaf

    after = copy.deepcopy(cache)
    for c in after:
        if not c.empty():
            c.state = tree_map(wide, c.state)
    return own(_with_weights(model, wide), tokens, cache=after), after


def a_little_apart(model: Any, tokens: mx.array, cache: Any, own: Callable[..., Any]) -> Result:
    """What the model gives with weights that are a little different, all of them."""
    keys = count()  # of their own: what its user draws stays what it is

    def moved(leaf: Any) -> Any:
        if not _is_float(leaf):
            return leaf
        noise = mx.random.normal(leaf.shape, mx.float32, key=mx.random.key(next(keys)))
        return (leaf * (1 + A_LITTLE * noise)).astype(leaf.dtype)

    after = copy.deepcopy(cache)
    return own(_with_weights(model, moved), tokens, cache=after), after


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def _with_weights(model: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a model whose weights are changed."""
    copied = shadow(model)
    copied.update(tree_map(change, copied.parameters()))  # type: ignore[no-untyped-call]
    return copied


def _parts(
    kinds: Sequence[Kind], result: Result, until: mx.array | None
) -> Iterator[tuple[str, list[mx.array]]]:
    """What is compared, by its place; of logits the last token's, if all rows have one."""
    logits, caches = result
    for layer, (kind, cache) in enumerate(zip(kinds, caches, strict=True)):
        yield f"layer {layer}", kind.content(cache, until)
    ended = any(kind.ends(c) for kind, c in zip(kinds, caches, strict=True))
    if logits is not None and not ended:
        yield "the logits", [logits[:, -1]]


def _distance(some: Sequence[mx.array], others: Sequence[mx.array]) -> float:
    """The root of the mean square of a - b, relative to that of b; the largest of the pairs.

    Of a buffer that is longer than the other the first positions count.
    """
    found = 0.0
    for a, b in zip(some, others, strict=True):
        if a.ndim == b.ndim == 4 and a.shape[2] > b.shape[2]:
            a = a[..., : b.shape[2], :]
        if a.shape != b.shape:
            return float("inf")
        if b.size:
            a, b = a.astype(mx.float32), b.astype(mx.float32)
            same = (a == b) | (mx.isnan(a) & mx.isnan(b))  # infinities, and what is no number
            apart = mx.where(same, 0, a - b)
            there = mx.where(mx.isfinite(b), b, 0)
            size = mx.sqrt(mx.mean(apart * apart)) / mx.sqrt(mx.mean(there * there) + 1e-30)
            number = size.item()
            assert isinstance(number, float)
            found = max(found, number if number == number else float("inf"))
    return found
