"""What placements cost: carrying out a node's share, converting a value, holding a weight."""

from __future__ import annotations

import math
from functools import cached_property

from ...ir.graph import Node, Value
from ...ir.kinds import VIEWS
from ...target import Target
from ...types import TensorType
from ..estimate import estimate
from .placement import REPLICATED, Placement, local_type

BANDWIDTH = {"cpu": 20e9, "metal": 200e9, "cuda": 2000e9}
"""Bytes a second that a node moves; as `analysis/schedule`, where sources are."""

FLOPS = {"cpu": 100e9, "metal": 7e12, "cuda": 400e12}
LAUNCH = 1e-6
TRIFLE = LAUNCH / 50
"""A node of less, such as a look-up of one row, is not worth splitting: ways that differ by nothing
else would crowd out those that need no collective later."""

HELD = 1e-6
"""Seconds that a byte of a weight is worth which every rank holds though each could hold a part.

More than any collective costs: a graph is spread because it is too large, or to read less on each
rank, so a weight is split wherever it can be.  Along which axis, and all else, time decides.
"""

GONE = 1e9
"""Seconds for a part of a weight that is not there any more: only where there is no other way."""

PADDED = 1e-9
"""Seconds that a byte of a part is worth: parts that are not even hold more than they need."""


SMALL = 1000
"""A weight of less than one part of so many of the model, such as a router's, may as well be held
by all ranks: it saves no memory to speak of, and a collective for it costs time at every call."""


class Costs:
    """The cost of placements on the mesh of a target.

    Args:
        target: with its mesh.
        held: seconds that a byte is worth which every rank holds.
        weights: bytes of all weights together.
    """

    def __init__(self, target: Target, held: float = HELD, weights: int = 0) -> None:
        assert target.mesh is not None
        self.mesh = target.mesh
        self.backend = target.backend
        self.held = held
        self.small = weights / SMALL
        self._whole: dict[Node, float] = {}

    @cached_property
    def _bandwidth(self) -> float:
        return BANDWIDTH.get(self.backend, 20e9)

    def node(self, node: Node, share: float) -> float:
        """Seconds of a node of which a rank does this share."""
        if node not in self._whole:
            if node.op in VIEWS:
                self._whole[node] = 0.0
            else:
                cost = estimate(node)
                flops = cost.flops / FLOPS.get(self.backend, 100e9)
                self._whole[node] = max(cost.nbytes / self._bandwidth, flops)
        whole = self._whole[node]
        if node.op in VIEWS:
            return 0.0
        return LAUNCH + (whole * share if whole > TRIFLE else whole)

    def holding(self, value: Value, placement: Placement) -> float:
        """What it is worth not to hold so much of a weight."""
        cheap = placement.kind == "split" or value.type.nbytes < self.small
        price = min(PADDED, self.held) if cheap else self.held
        return price * local_type(value.type, placement).nbytes

    def convert(
        self, type: TensorType, have: tuple[Placement, ...], want: Placement
    ) -> tuple[float, tuple[Placement, ...]]:
        """Seconds to have a value placed as wanted, and the placements that it has then."""
        if want in have or (want.kind == "owned" and REPLICATED in have):
            return 0.0, have
        best: float = math.inf
        through: tuple[Placement, ...] = ()
        for one in have:
            seconds, added = self._step(type, one, want)
            if seconds < best:
                best, through = seconds, added
        return best, tuple(dict.fromkeys((*have, *through)))  # the first one it had stays first

    def _step(
        self, type: TensorType, one: Placement, want: Placement
    ) -> tuple[float, tuple[Placement, ...]]:
        copy = LAUNCH + type.nbytes / self._bandwidth
        if one.kind == "replicated":
            if want.kind in ("split", "partial"):
                return copy, (want,)
            return math.inf, ()
        if one.kind == "owned" and want.kind == "partial":
            return copy, (want,)
        if want.kind == "owned" or want.kind == "partial":
            return math.inf, ()
        joined = self.to_whole(type, one)
        if want.kind == "replicated":
            return joined, (REPLICATED,)
        if one.kind == "partial" and self.scatters(type, want):
            return self.mesh.seconds("sum_scatter", type.nbytes), (want,)
        return joined + copy, (REPLICATED, want)

    def to_whole(self, type: TensorType, one: Placement) -> float:
        if one.kind == "split":
            padded = local_type(type, one).nbytes * self.mesh.size
            return self.mesh.seconds("all_gather", padded) + LAUNCH
        rows = type.rows if one.kind == "partial" else None  # others are no product's
        return self.mesh.seconds("all_sum", type.nbytes, rows)

    def scatters(self, type: TensorType, want: Placement) -> bool:
        """Can partial sums become parts at once?  The ring cannot."""
        even = type.shape[want.axis] == want.size * self.mesh.size
        return even and self.mesh.backend == "nccl"
