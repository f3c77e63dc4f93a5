"""Which ways to carry out a node are worth trying, where values lie on the mesh as they do.

To try all at every node would be to try them for nothing mostly: what all ranks hold is split only
for a weight's sake, or because something else is split already or can be.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from ...ir.graph import Node, Value
from ...ir.ops import OPS
from .across import across
from .costs import GONE, Costs
from .frame import Frame, Have
from .parts import is_there
from .placement import PARTIAL, REPLICATED, Placement, split
from .strategies import Strategy, on_owned, strategies, whole
from .units import Units


class Ways:
    """Ways of a graph's nodes, in bodies too.

    Args:
        fixed: values that are the same at every call, which may be had in any placement.
    """

    def __init__(self, units: Units, costs: Costs, fixed: Collection[Value]) -> None:
        self._units = units
        self._costs = costs
        self._fixed = fixed
        self._ways: dict[Node, list[Strategy]] = {}
        self._columns: dict[Node, bool] = {}
        self._held: dict[tuple[Value, Placement], float] = {}

    def of(self, node: Node, live: Mapping[Value, Have], frame: Frame) -> Iterator[Strategy]:
        """Doing it whole, and what else may be cheaper where values lie so."""
        if node.op in ("shard", "replicate"):
            yield _stated(node, self._costs.mesh.size)
            return
        yield whole(node)
        if node not in self._ways:
            ways = [*strategies(node, self._units), *across(node, self._units)]
            self._ways[node] = [
                way._replace(seconds=sum(self._costs.mesh.seconds(*talk) for talk in way.talks))
                for way in ways
            ]
        here = [() if v in self._fixed else live.get(v, ()) for v in node.inputs]
        kinds = {p.kind for have in here for p in have}
        for way in self._ways[node]:
            if self._worth_trying(node, way, here, kinds, live, frame):
                yield way
        if "owned" in kinds:
            for rows in {p for have in here for p in have if p.kind == "owned"}:
                apart = on_owned(node, self._units.spec(node), rows)
                if apart is not None:
                    yield apart

    def _worth_trying(
        self,
        node: Node,
        way: Strategy,
        here: Sequence[Have],
        kinds: Collection[str],
        live: Mapping[Value, Have],
        frame: Frame,
    ) -> bool:
        """Is anything there already as the strategy needs it, or a weight that can be?"""
        if PARTIAL in way.needs and not way.contracted:
            return "partial" in kinds or "owned" in kinds
        if way.contracted and self._splits_results(node):
            # To split the rows of a weight costs no more than its columns, unless its other operand
            # is split already, or no other part of the weight is there.
            return any(
                way.needs[i] in here[i] or self._is_all(node, node.inputs[i], way.needs[i])
                for i in way.contracted
            )
        made = True
        for value, need, have in zip(node.inputs, way.needs, here, strict=True):
            if value.ndim:
                made = False
            if need.kind not in ("split", "owned"):
                continue
            if need in have or (PARTIAL in have and self._costs.scatters(value.type, need)):
                return True
            if value in self._fixed and is_weight(node, value):
                return True
            if value in frame.free and value not in live:
                return True
        return made  # nothing but numbers goes in: any part can be made

    def _is_all(self, node: Node, value: Value, place: Placement) -> bool:
        """Is this part all that is there of a weight?"""
        if value not in self._fixed or not is_weight(node, value):
            return False
        return self.holding(value, place) < GONE <= self.holding(value, REPLICATED)

    def _splits_results(self, node: Node) -> bool:
        """Can the results be split by splitting a weight?"""
        if node not in self._columns:
            self._columns[node] = any(
                way.gives[0].kind == "split"
                and any(
                    need.kind == "split" and v in self._fixed
                    for v, need in zip(node.inputs, way.needs, strict=True)
                )
                for way in self._ways[node]
            )
        return self._columns[node]

    def holding(self, value: Value, place: Placement) -> float:
        """What it costs to hold a weight so; of what was let go, no program can have more."""
        if (value, place) not in self._held:
            there = is_there(value, place, self._units)
            self._held[value, place] = self._costs.holding(value, place) if there else GONE
        return self._held[value, place]


def is_weight(node: Node, value: Value) -> bool:
    """Is a fixed value a weight where this node reads it: of a product, or a table of rows?"""
    if value.ndim < 2 or node.op not in OPS:
        return False
    is_table = node.op in ("take", "getitem") and value is node.inputs[0]
    return is_table or OPS[node.op].kind in _WITH_WEIGHTS


_WITH_WEIGHTS = frozenset({"product", "quantization", "convolution"})


def _stated(node: Node, ranks: int) -> Strategy:
    """What the user said."""
    x = node.operand("x")
    if node.op == "replicate" or not x.shape:
        return whole(node)
    axis = node.args["axis"] % x.ndim
    place = split(axis, -(-x.shape[axis] // ranks))
    return Strategy((place,), (place,))
