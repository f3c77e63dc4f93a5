"""Placements: how a value lies on a mesh."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ...ir.graph import Value
from ...types import TensorType

Kind = Literal["replicated", "split", "partial", "owned"]


class Placement(NamedTuple):
    """How a value lies on a mesh.

    Attributes:
        kind: "replicated", every rank holds all of it; "split", each a part along an axis;
            "partial", the value is the sum of what the ranks hold; "owned", each element is right
            on one rank alone, and nothing on the others.
        axis: of a split value.
        size: length of each rank's part along that axis.  The parts are equally long: what they
            reach beyond the end of the value means nothing.  Of an owned value, how many rows of
            the table each rank holds.
        indices: of an owned value, which row of the table each of its rows came from; the rank that
            holds that row owns it.
    """

    kind: Kind
    axis: int = 0
    size: int = 0
    indices: Value | None = None

    def __str__(self) -> str:
        if self.kind == "split":
            return f"split axis {self.axis} by {self.size}"
        return self.kind


REPLICATED = Placement("replicated")
PARTIAL = Placement("partial")


def split(axis: int, size: int) -> Placement:
    """Each rank holds `size` elements along `axis`."""
    return Placement("split", axis, size)


def owned(indices: Value, size: int) -> Placement:
    """Rows picked by `indices` from a table of which each rank holds `size` rows."""
    return Placement("owned", 0, size, indices)


def local_type(type: TensorType, placement: Placement) -> TensorType:
    """The type of what one rank holds.

    >>> import mlx.core as mx
    >>> local_type(TensorType((9, 4), mx.float32), split(0, 5))
    f32[5,4]
    """
    if placement.kind != "split":
        return type
    shape = list(type.shape)
    shape[placement.axis] = placement.size
    return TensorType(tuple(shape), type.dtype)
