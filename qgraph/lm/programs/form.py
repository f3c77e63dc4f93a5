"""What a program is made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ...kernels.base import HALF
from ..caches.kind import Kind


@dataclass(frozen=True)
class Form:
    """What a program is made for: all of a call but the arrays themselves.

    Attributes:
        rows, count, fresh: as `Call` has them.
        kinds: of the caches, and what of them belongs to the program.
        places: for each cache, which of the numbers are its own.
        numbers, arrays: shapes and dtypes, the arrays by cache.
    """

    rows: int
    count: int
    fresh: bool
    kinds: tuple[tuple[Kind, Any], ...]
    places: tuple[tuple[int, ...], ...]
    numbers: tuple[Any, ...]
    arrays: tuple[Any, ...]

    def __post_init__(self) -> None:
        parts = (self.rows, self.count, self.fresh, self.kinds, self.places, self.numbers)
        object.__setattr__(self, "_hash", hash((parts, self.arrays)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined,no-any-return]

    def key(self) -> str:
        """The form as text, the same in each process."""
        parts = (self.rows, self.count, self.fresh, self.kinds, self.places, self.numbers)
        return repr((parts, self.arrays))

    @property
    def inputs(self) -> int:
        """How many a program has: tokens, numbers, how many tokens are no padding, arrays."""
        return 1 + len(self.numbers) + (self.count > 1) + sum(map(len, self.arrays))

    def states(self) -> list[tuple[int, int]]:
        """The caches: numbers of inputs, and of the outputs that they are after a call."""
        count = sum(map(len, self.arrays))
        return [(self.inputs - count + i, 1 + i) for i in range(count)]

    @property
    def is_half(self) -> bool:
        """Are the caches, and so the model, of half precision?"""
        return any(dtype in HALF for some in self.arrays for _, dtype in some)

    @property
    def length(self) -> int:
        """Positions of the largest buffer."""
        found = [shape[2] for some in self.arrays for shape, _ in some if len(shape) == 4]
        return max(found, default=0)

    def __str__(self) -> str:
        rows = "" if self.rows == 1 else f"{self.rows} rows of "
        tokens = f"{self.count} tokens" if self.count > 1 else "a token"
        first = ", the first" if self.fresh else ""
        return f"{rows}{tokens}{first}" + (f", {self.length} positions" if self.length else "")


def types_of(arrays: Sequence[mx.array]) -> tuple[Any, ...]:
    return tuple((a.shape, a.dtype) for a in arrays)
