"""Prompts of any length through a handful of programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...target import Target


@dataclass(frozen=True)
class Sizes:
    """The tokens that programs take at once.

    Attributes:
        sizes: powers of two.
        waste: how many times as large as what it takes a piece may be.  A GPU's time hardly grows
            with a few rows more, and making a program takes it longest.
    """

    sizes: tuple[int, ...]
    waste: float

    def pieces(self, count: int, pads: bool, ends: bool = False) -> Iterator[tuple[int, int, int]]:
        """Where each piece of `count` tokens begins, how many it takes, and of what size it is.

        Args:
            pads: may a piece be larger than what it takes?
            ends: do rows end before the last token?  mlx-lm then takes no token alone.

        >>> list(ON_CPU.pieces(19, pads=True))
        [(0, 16, 16), (16, 3, 4)]
        >>> list(ON_CPU.pieces(6, pads=False))
        [(0, 4, 4), (4, 1, 1), (5, 1, 1)]
        >>> list(ON_CPU.pieces(17, pads=True, ends=True))
        [(0, 15, 16), (15, 2, 4)]
        """
        sizes = self.sizes[1:] if ends and pads else self.sizes
        at = 0
        while at < count:
            left = count - at
            larger = next((size for size in sizes if left <= size), None)
            fits = larger == left or (pads and larger is not None and larger < self.waste * left)
            if larger is not None and (fits or larger == sizes[0]):
                yield at, left, larger
                return
            size = max(size for size in sizes if size <= left)
            taken = size - 1 if ends and pads and left - size == 1 else size
            yield at, taken, size
            at += taken


ON_CPU = Sizes((1, 4, 16, 64, 256, 512), waste=2.0)
ON_GPU = Sizes((1, 4, 16, 64, 256, 512, 1024, 2048), waste=4.0)


def sizes_for(target: Target) -> Sizes:
    return ON_CPU if target.is_cpu else ON_GPU
