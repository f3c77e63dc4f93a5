"""The placements that were chosen for a graph."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...ir.graph import Node, Value
from .placement import Placement
from .strategies import Strategy


@dataclass
class Assignment:
    """What was chosen for a graph.

    Attributes:
        strategies: for each node that is carried out.
        inputs: placements of inputs that are not replicated.
        outputs: placements of the outputs.
        bodies: what was chosen for the bodies of loops and branches.
        seconds: that a call should take, with what held weights are worth.
    """

    strategies: dict[Node, Strategy] = field(default_factory=dict)
    inputs: dict[Value, Placement] = field(default_factory=dict)
    outputs: list[Placement] = field(default_factory=list)
    bodies: dict[Node, list[Assignment]] = field(default_factory=dict)
    seconds: float = 0.0
