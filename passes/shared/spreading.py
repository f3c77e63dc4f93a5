"""A graph as one rank runs it: nodes on what the rank holds, collectives where they are needed.

Every rank runs the same graph; what differs is which part `distributed.part` takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from qgraph.analysis.placements import PARTIAL, REPLICATED, Placement, local_type
from qgraph.analysis.placements.assignment import Assignment
from qgraph.analysis.placements.costs import Costs
from qgraph.analysis.placements.parts import in_parts
from qgraph.analysis.placements.search import Search
from qgraph.analysis.placements.strategies import Strategy
from qgraph.ir.graph import Graph, Node, Value, constant_value, input_value, is_constant
from qgraph.origin import stating
from qgraph.tracing.tensor import Tensor, apply

from .collectives import Collectives
from .padding import Padding
from .ranks import Rank
from .rebuilding import rebuilt
from .spread_loops import spread_loop


class Spreading:
    """One graph, or body, node by node.

    Args:
        graph: as it was written.
        chosen: its placements.
        search: that chose them.
        made_by: the pass.
        inputs: of the new graph, in place of those that are not replicated; without them the graph
            takes and gives whole values, and parts of states are taken and joined at its ends.

    Attributes:
        slices: by slice of a weight and placement, the new input of a body that is it.
        collectives, padding, rank: what ways to carry out an op across its axis are made of.
    """

    def __init__(
        self,
        graph: Graph,
        chosen: Assignment,
        search: Search,
        made_by: str,
        inputs: Mapping[Value, Value] | None = None,
    ) -> None:
        self.graph = graph
        self.chosen = chosen
        self.search = search
        self.costs: Costs = search.costs
        self.slices: dict[tuple[Value, Placement], Value] = {}
        self.collectives = Collectives(self.costs.mesh, made_by)
        self.rank = Rank(self.costs.mesh.size)
        self.padding = Padding(self.rank)
        self._made_by = made_by
        self._slices: frozenset[Value] = frozenset()
        self._have: dict[Value, dict[Placement, Value]] = {}
        self._owner: dict[Placement, Value] = {}
        for value in graph.inputs:
            place = REPLICATED if inputs is None else chosen.inputs.get(value, REPLICATED)
            self._have[value] = {place: value if inputs is None else inputs.get(value, value)}
        self._joins = inputs is None

    def run(self, slices: Sequence[Value] = ()) -> list[Value]:
        """The graph's outputs, placed as chosen.

        Args:
            slices: inputs that are slices of weights, which may be had in any placement.
        """
        self._slices = frozenset(slices)
        for node in self.graph.nodes:
            way = self.chosen.strategies.get(node)
            if way is not None:
                with stating(node.origin.by(self._made_by)):
                    self._carry_out(node, way)
        results = []
        for value, place in zip(self.graph.outputs, self.chosen.outputs, strict=True):
            with stating(value.node.origin.by(self._made_by)):
                found = self.get(value, place, None)
                if self._joins and place.kind == "split":
                    given = (Tensor(found), place.axis, value.shape[place.axis], self.rank.ranks)
                    found = apply("distributed.join", given).value
                results.append(found)
        return results

    # Values in their placements.

    def get(self, value: Value, place: Placement, reader: Node | None) -> Value:
        """What a rank holds of `value`, placed as `reader` needs it."""
        if value in self.search.fixed:
            return self._fixed(value, place)
        have = self._have[value]
        if place in have:
            return have[place]
        if place.kind == "owned" and REPLICATED in have:
            return have[REPLICATED]
        _, after = self.costs.convert(value.type, tuple(have), place)
        for step in after:
            if step not in have:
                have[step] = self._convert(value, have, step, reader)
        return have[place]

    def _convert(
        self, value: Value, have: Mapping[Placement, Value], want: Placement, reader: Node | None
    ) -> Value:
        if REPLICATED in have:
            return self._from_whole(have[REPLICATED], want)
        one = min(have, key=lambda p: self.costs.convert(value.type, (p,), want)[0])
        local = have[one]
        if one.kind == "owned":
            local = self._where_owned(local, one)
            if want == PARTIAL:
                return local
        elif one.kind == "split":
            return self.collectives.gather(local, value, one, reader)
        elif want.kind == "split":
            return self.collectives.scatter(local, value, one, want, reader)
        return self.collectives.all_sum(local, value, one, reader)

    def _from_whole(self, local: Value, want: Placement) -> Value:
        if want.kind == "split":
            return self.part_of(local, want)
        first = apply("equal", (self.rank.number(), 0))
        found: Value = apply("where", (first, Tensor(local), _zero(local))).value
        return found

    def part_of(self, whole: Value, place: Placement) -> Value:
        """This rank's part of what all hold."""
        given = (Tensor(whole), place.axis, place.size, self.rank.ranks)
        found: Value = apply("distributed.part", given).value
        self.padding.zeros(found)
        return found

    def _where_owned(self, local: Value, one: Placement) -> Value:
        """Zeros in place of the rows that another rank owns."""
        assert one.indices is not None
        if one not in self._owner:
            self._owner[one] = self.rank.is_owner(self.get(one.indices, REPLICATED, None), one.size)
        mine = Tensor(self._owner[one])
        more = local.ndim - mine.ndim
        mine = apply("reshape", (mine, (*mine.shape, *(1,) * more)))
        found: Value = apply("where", (mine, Tensor(local), _zero(local))).value
        return found

    # What is the same at every call.

    def _fixed(self, value: Value, place: Placement) -> Value:
        """A weight, or what is computed from weights alone; computed in parts if it can be."""
        if value in self._slices:
            return self._slice(value, place)
        have = self._have.setdefault(value, {REPLICATED: value})
        if place in have:
            return have[place]
        with stating(value.node.origin.by(self._made_by)):
            if place.kind == "split" and not is_constant(value) and value.node.op != "input":
                self._in_parts(value, place)
            if place not in have:
                have[place] = self._from_whole(value, place)
        return have[place]

    def _slice(self, value: Value, place: Placement) -> Value:
        key = (value, place)
        if key not in self.slices:
            fresh = input_value(local_type(value.type, place), value.node.args["name"])
            self.slices[key] = value if place == REPLICATED else fresh
            if place != REPLICATED:
                self.padding.zeros(fresh)
        return self.slices[key]

    def _in_parts(self, value: Value, place: Placement) -> None:
        node = value.node
        way = in_parts(value, place, self.search.units)
        if way is not None:
            results = self._same_op(node, way)
            for out, where, new in zip(node.outputs, way.gives, results, strict=True):
                self._have.setdefault(out, {REPLICATED: out})[where] = new

    # Nodes.

    def _carry_out(self, node: Node, way: Strategy) -> None:
        if node.bodies:
            chosen, fixed = self.chosen.bodies[node], self.search.fixed
            results = spread_loop(self, node, way, chosen, fixed, self._inner)
        elif node.op in ("shard", "replicate"):
            results = [self.get(node.operand("x"), way.needs[0], node)]
        elif way.build is not None:
            results = way.build(self, node, self._operands(node, way))
        else:
            results = self._same_op(node, way)
        for value, place, new in zip(node.outputs, way.gives, results, strict=True):
            self._have[value] = {place: new}

    def _inner(self, graph: Graph, chosen: Assignment, inputs: Mapping[Value, Value]) -> Spreading:
        return Spreading(graph, chosen, self.search, self._made_by, inputs)

    def _operands(self, node: Node, way: Strategy) -> list[Value]:
        return [self.get(v, p, node) for v, p in zip(node.inputs, way.needs, strict=True)]

    def _same_op(self, node: Node, way: Strategy) -> Sequence[Value]:
        local = self.padding.kept_out(node, way, self._operands(node, way))
        types = [local_type(v.type, p) for v, p in zip(node.outputs, way.gives, strict=True)]
        spec = self.search.units.spec(node)
        changed: Mapping[str, Any] = {}
        is_split = any(p.kind == "split" for p in (*way.needs, *way.gives))
        if spec is not None and spec.local_args is not None and is_split:
            changed = spec.local_args(node, [v.type for v in local], types)
        new = rebuilt(node, local, changed)
        self.padding.follow(node, way, local, new)
        return new.outputs

    def look_up(self, node: Node, local: Sequence[Value], index: int, size: int) -> Sequence[Value]:
        """A look-up in a rank's rows of a table; of rows that it does not hold, some other row."""
        given = list(local)
        given[index] = self.rank.own_rows(local[index], size)
        return rebuilt(node, given, {}).outputs


def _zero(like: Value) -> Tensor:
    return Tensor(constant_value(mx.zeros((), like.dtype)))
