"""The rank that runs a graph, in its computations: which rows of a table are its own?"""

from __future__ import annotations

import mlx.core as mx

from qgraph.ir.graph import Value, constant_value
from qgraph.tracing.tensor import Tensor, apply


class Rank:
    """A rank's number: its part of 0, 1, 2, … as all ranks run one graph.

    Args:
        ranks: how many there are.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._number: Value | None = None
        self._near: dict[tuple[Value, int], Value] = {}

    def number(self) -> Tensor:
        """int32 without axes."""
        if self._number is None:
            numbers = Tensor(constant_value(mx.arange(self.ranks, dtype=mx.int32), "ranks"))
            one = apply("distributed.part", (numbers, 0, 1, self.ranks))
            self._number = apply("reshape", (one, ())).value
        return Tensor(self._number)

    def first_row(self, size: int) -> Tensor:
        """Of its part of a table of which each rank has `size` rows."""
        found: Tensor = apply("multiply", (self.number(), size))
        return found

    def own_rows(self, indices: Value, size: int) -> Value:
        """Indices into its part of such a table; those of rows that it does not hold are wrong."""
        key = indices, size
        if key not in self._near:
            given = Tensor(indices)
            mine = apply("subtract", (given.astype(mx.int32), self.first_row(size)))
            self._near[key] = apply("clip", (mine, 0, size - 1)).astype(given.dtype).value
        return self._near[key]

    def is_owner(self, indices: Value, size: int) -> Value:
        """Where it is the one that holds the row."""
        place = apply("floor_divide", (Tensor(indices).astype(mx.int32), size))
        found: Value = apply("equal", (place, self.number())).value
        return found
