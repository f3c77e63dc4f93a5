"""Prompts of any length through a handful of programs."""

from __future__ import annotations

from collections.abc import Iterator

SIZES = (1, 4, 16, 64, 256, 1024)
"""Tokens that programs take at once."""


def pieces(count: int, pads: bool, ends: bool = False) -> Iterator[tuple[int, int, int]]:
    """Where each piece of `count` tokens begins, how many it takes, and of what size it is.

    Args:
        pads: may a piece be larger than what it takes?
        ends: do rows end before the last token?  mlx-lm then takes no token alone.

    >>> list(pieces(19, pads=True))
    [(0, 16, 16), (16, 3, 4)]
    >>> list(pieces(6, pads=False))
    [(0, 4, 4), (4, 1, 1), (5, 1, 1)]
    >>> list(pieces(17, pads=True, ends=True))
    [(0, 15, 16), (15, 2, 4)]
    """
    sizes = SIZES[1:] if ends and pads else SIZES
    at = 0
    while at < count:
        left = count - at
        larger = next((size for size in sizes if left <= size), None)
        fits = larger == left or (pads and larger is not None and larger < 2 * left)
        if larger is not None and (fits or larger == sizes[0]):
            yield at, left, larger
            return
        size = max(size for size in sizes if size <= left)
        taken = size - 1 if ends and pads and left - size == 1 else size
        yield at, taken, size
        at += taken
