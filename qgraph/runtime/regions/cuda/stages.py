"""A region as phases: a product, what its rows are computed from, and what follows it.

Between two products nothing is written but what the next one, or whoever comes after the region,
reads.  Elementwise operations on a product's result are carried out where its sums are finished;
a norm, which needs the whole row, and what follows it, by every block for itself when it takes the
rows into its shared memory.  The first phase may be an attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from ....ir.graph import Value
from ....kernels.base import Problem
from .attention import Attention
from .experts import ByExpert
from .expressions import Expression, Leaf, Summed
from .pick import Pick
from .routing import Router


@dataclass
class Row:
    """A row that is written to memory as it is computed, not as a product is finished.

    Attributes:
        phase: before whose product it is written.
    """

    into: str
    dtype: mx.Dtype
    columns: int
    expression: Expression
    phase: int


@dataclass
class Phase:
    """A product.

    Attributes:
        x: its rows.
        weight, scales: names of the packed weight's parts.
        parts: into how many parts of equal width its result is split.
        by: which matrices it takes, where a router chooses them; if results are added up, its parts
            are a row's experts.
        writes: what is written of it, of `width` columns: to where, and the expression.
    """

    problem: Problem
    x: Expression
    weight: str
    scales: str
    parts: int
    by: ByExpert | None = None
    writes: list[tuple[Leaf, Expression]] = field(default_factory=list)

    @property
    def width(self) -> int:
        return self.problem.n // (1 if self.by is not None and self.by.added else self.parts)

    @property
    def is_summed(self) -> bool:
        """Does a sum over the ranks of a mesh wait for it?"""
        return any(isinstance(into, Summed) for into, _ in self.writes)


@dataclass
class Stages:
    """A region.

    Attributes:
        rows: of x, in all phases.
        inputs: names of the inputs that are read.
        phases: in order, a barrier between them.
        results: names of the arrays for the body's results.
        arrays: all that is written, by name: shape and dtype.  What is no result is of use to the
            region alone.
        written: rows that are no product's.
        routers: which experts rows have, each before the phase that it names.
        addends: bytes that a rank adds to sums over the mesh.
        within: arrays that lie in others, by name: in which, and from which element on.
    """

    rows: int
    inputs: dict[Value, str]
    phases: list[Phase | Attention | Pick]
    results: list[str]
    arrays: dict[str, tuple[tuple[int, ...], mx.Dtype]]
    written: list[Row]
    routers: list[Router] = field(default_factory=list)
    addends: int = 0
    within: dict[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def products(self) -> dict[int, Phase]:
        """Those of the phases that are products, by their numbers."""
        return {i: phase for i, phase in enumerate(self.phases) if isinstance(phase, Phase)}
