"""Prompts of any length through a handful of programs."""

from __future__ import annotations

from collections.abc import Iterator

SIZES = (1, 4, 16, 64, 256, 1024)
"""Tokens that programs take at once."""


def pieces(count: int, pads: bool) -> Iterator[tuple[int, int, int]]:
    """Where each piece of `count` tokens begins, how many it takes, and of what size it is.

    Args:
        pads: may a piece be larger than what it takes?

    >>> list(pieces(19, pads=True))
    [(0, 16, 16), (16, 3, 4)]
    >>> list(pieces(6, pads=False))
    [(0, 4, 4), (4, 1, 1), (5, 1, 1)]
    """
    at = 0
    while at < count:
        left = count - at
        larger = next((size for size in SIZES if left <= size), None)
        if larger is not None and (larger == left or (pads and larger < 2 * left)):
            yield at, left, larger
            return
        size = max(size for size in SIZES if size <= left)
        yield at, size, size
        at += size
