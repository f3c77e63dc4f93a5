"""Parts of what is computed from weights alone: from which parts of the weights they come."""

from __future__ import annotations

from ...ir.graph import Value, is_constant
from .placement import REPLICATED, Placement
from .strategies import Strategy, strategies
from .units import Units


def in_parts(value: Value, place: Placement, units: Units) -> Strategy | None:
    """The way to compute `value` so placed on parts of its operands, if there is one."""
    for way in strategies(value.node, units):
        parts_only = all(p.kind in ("replicated", "split") for p in way.needs)
        if way.gives[value.index] == place and parts_only and way.build is None:
            return way
    return None


def is_there(value: Value, place: Placement, units: Units) -> bool:
    """Can a rank have this part, or were weights below it let go but for other parts?

    Programs of one model share what was packed, and a rank that has packed its part of a weight
    lets the rest go.
    """
    if is_constant(value):
        data = value.node.args["data"]
        packed = place.kind == "split" and (place.axis, place.size) in data.parts
        return packed or not data.is_released
    way = in_parts(value, place, units) if place.kind == "split" else None
    needs = (REPLICATED,) * len(value.node.inputs) if way is None else way.needs
    return all(is_there(v, p, units) for v, p in zip(value.node.inputs, needs, strict=True))
