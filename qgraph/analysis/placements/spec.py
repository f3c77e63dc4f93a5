"""How an op's axes belong together: what is split along one is split along the others too.

Each axis of an operand or a result bears a label, or none if it cannot be split.  A label counts in
units that must not be torn apart, such as a group of a packed weight or a head: an axis has so many
elements for each unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...ir.graph import Node, Value
from ...types import TensorType

Label = Hashable

Partial = Literal["no", "each", "all", "first"]


@dataclass(frozen=True, slots=True)
class Dim:
    """An axis with a label: `per` elements of it are one unit of the label."""

    label: Label
    per: int = 1


Dims = tuple[Dim | None, ...]

LocalArgs = Callable[[Node, Sequence[TensorType], Sequence[TensorType]], Mapping[str, Any]]
"""From the node and the local types of its operands and results: static arguments that change."""


@dataclass(frozen=True)
class Spec:
    """The labels of an op's axes.

    Attributes:
        operands: for each of the node's inputs, its axes.
        results: for each output, its axes.
        units: how many units a label counts.
        sums: labels that the op sums over: split along one, it gives partial sums.
        whole: labels of axes that the op needs whole, through which units flow all the same.
        added: operands that are added to a sum, so that only one rank may add them.
        partial: whether partial sums may go in: "each" operand alone with the others replicated
            (a product), "all" operands together (a sum), the "first" alone, or "no".
        rows: how many leading axes of operands and results are rows that the op treats apart, for
            owned rows to go through; 0 if it does not.
        local_args: what else changes in the arguments.
        table: for a look-up of rows, (operand that is the table, operand that holds the indices).
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    units: Mapping[Label, int]
    sums: frozenset[Label] = frozenset()
    whole: frozenset[Label] = frozenset()
    added: frozenset[int] = frozenset()
    partial: Partial = "no"
    pointwise: bool = False
    local_args: LocalArgs | None = None
    table: tuple[int, int] | None = None


def of_sizes(operands: Sequence[Dims], results: Sequence[Dims], node: Node, **more: Any) -> Spec:
    """A spec whose units follow from the shapes, wherever an axis has more than one of them.

    Axes of one element lose their label where others with it have more: they are broadcast.
    """
    values = [*zip(node.inputs, operands, strict=True), *zip(node.outputs, results, strict=True)]
    units: dict[Label, int] = {}
    for value, dims in values:
        for length, dim in zip(value.shape, dims, strict=True):
            if dim is not None and length % dim.per == 0:
                units[dim.label] = max(units.get(dim.label, 1), length // dim.per)

    def fit(value: Value, dims: Dims) -> Dims:
        return tuple(
            dim if dim is not None and units.get(dim.label, 1) * dim.per == length > 1 else None
            for length, dim in zip(value.shape, dims, strict=True)
        )

    return Spec(
        tuple(fit(v, d) for v, d in zip(node.inputs, operands, strict=True)),
        tuple(fit(v, d) for v, d in zip(node.outputs, results, strict=True)),
        {label: count for label, count in units.items() if count > 1},
        **more,
    )


def own_axes(value: Value, but: Sequence[int] = ()) -> Dims:
    """A label for each axis, its number; none for those in `but`."""
    without = {axis % value.ndim for axis in but} if value.ndim else set()
    return tuple(None if axis in without else Dim(axis) for axis in range(value.ndim))


def from_right(value: Value) -> Dims:
    """Labels by their place from the right, as broadcasting aligns axes."""
    return tuple(Dim(axis - value.ndim) for axis in range(value.ndim))


def no_axes(value: Value) -> Dims:
    return (None,) * value.ndim


def common_unit(length: int, most: int = 8) -> int:
    """The largest power of two up to `most` that divides `length`; kernels want whole tiles."""
    return math.gcd(length, most)
