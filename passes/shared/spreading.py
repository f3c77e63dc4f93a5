"""A graph as one rank runs it: nodes on what the rank holds, collectives where they are needed.

Every rank runs the same graph.  What differs is which part `distributed.part` takes, so a rank's
number in computations (whose row is this?) is the part of 0, 1, 2, …
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from qgraph.analysis.placements import PARTIAL, REPLICATED, Placement, local_type
from qgraph.analysis.placements.costs import Costs
from qgraph.analysis.placements.parts import in_parts
from qgraph.analysis.placements.search import Assignment, Search
from qgraph.analysis.placements.strategies import Strategy
from qgraph.ir.graph import (
    Graph,
    Node,
    Value,
    constant_value,
    in_order,
    input_value,
    is_constant,
    is_scalar,
    map_values,
)
from qgraph.ir.kinds import SAME_ELEMENTS
from qgraph.ir.loops import bodies
from qgraph.ir.ops import OPS
from qgraph.origin import stating
from qgraph.rewrite.ledger import Entry, record
from qgraph.tracing.nodes import infer
from qgraph.tracing.tensor import Tensor, apply

_NAME = "shard"

_LAYOUT = SAME_ELEMENTS | {
    "getitem",
    "slice",
    "concatenate",
    "split",
    "stack",
    "take",
    "slice_update",
}
"""Ops that move elements: where all their operands are padded with one number, so are they."""

_KEEPS_ZEROS = frozenset({"fast.rope", "fast.rms_norm", "quantize", "dequantize", "zeros"})


class Spreading:
    """One graph, or body, node by node.

    Args:
        graph: as it was written.
        chosen: its placements.
        search: that chose them.
        inputs: of the new graph, in place of those that are not replicated; without them the graph
            takes and gives whole values, and parts of states are taken and joined at its ends.
    """

    def __init__(
        self,
        graph: Graph,
        chosen: Assignment,
        search: Search,
        inputs: Mapping[Value, Value] | None = None,
    ) -> None:
        self.graph = graph
        self.chosen = chosen
        self.search = search
        self.costs: Costs = search.costs
        self.ranks = self.costs.mesh.size
        self.slices: dict[tuple[Value, Placement], Value] = {}
        self._slices: frozenset[Value] = frozenset()
        self._have: dict[Value, dict[Placement, Value]] = {}
        self._pads: dict[Value, float | None] = {}
        self._rank: Value | None = None
        self._near: dict[tuple[Value, int], Value] = {}
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
                with stating(node.origin.by(_NAME)):
                    self._carry_out(node, way)
        results = []
        for value, place in zip(self.graph.outputs, self.chosen.outputs, strict=True):
            with stating(value.node.origin.by(_NAME)):
                found = self.get(value, place, None)
                if self._joins and place.kind == "split":
                    given = (Tensor(found), place.axis, value.shape[place.axis], self.ranks)
                    found = _value(apply("distributed.join", given))
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
            masked = self._where_owned(local, one)
            if want == PARTIAL:
                return masked
            return self._collective("all_sum", masked, value, one, reader)
        if one == PARTIAL:
            if want.kind == "split":
                return self._scatter(value, local, want, reader)
            return self._collective("all_sum", local, value, one, reader)
        return self._gather(value, local, one, reader)

    def _from_whole(self, local: Value, want: Placement) -> Value:
        if want.kind == "split":
            found = self._part(local, want)
            self._pads[found] = 0.0
            return found
        first = apply("equal", (Tensor(self.rank()), 0))
        return _value(apply("where", (first, Tensor(local), _zero(local))))

    def _part(self, whole: Value, want: Placement) -> Value:
        return _value(apply("distributed.part", (Tensor(whole), want.axis, want.size, self.ranks)))

    def _collective(
        self, op: str, local: Value, value: Value, one: Placement, reader: Node | None
    ) -> Value:
        nbytes = local.type.nbytes * (self.ranks if op == "all_gather" else 1)
        expected = f"{nbytes} bytes, {1e6 * self.costs.mesh.seconds(op, nbytes):.0f} µs"
        record(_entry(op, value, one, reader, expected))
        args = (Tensor(local),) if op in _ON_WHOLE else (Tensor(local), self.ranks)
        node = _value(apply(f"distributed.{op}", args)).node
        how = f"{op} over {self.costs.mesh.backend}, {expected}"
        return node.replace(kernel=how).output

    def _gather(self, value: Value, local: Value, one: Placement, reader: Node | None) -> Value:
        """Parts are joined along the first axis: those along another are brought there and back."""
        joined = Tensor(self._collective("all_gather", local, value, one, reader))
        axis, shape = one.axis, local.shape
        whole = [*shape]
        whole[axis] *= self.ranks
        if math.prod(shape[:axis]) > 1:
            joined = apply("reshape", (joined, (self.ranks, *shape)))
            joined = apply("moveaxis", (joined, 0, axis))
        if tuple(whole) != joined.shape:
            joined = apply("reshape", (joined, tuple(whole)))
        if whole[axis] != value.shape[axis]:
            places = [slice(None)] * axis + [slice(0, value.shape[axis])]
            joined = apply("getitem", (joined, tuple(places)))
        return _value(joined)

    def _scatter(self, value: Value, local: Value, want: Placement, reader: Node | None) -> Value:
        axis, shape = want.axis, list(local.shape)
        x = Tensor(local)
        if math.prod(shape[:axis]) > 1:
            x = apply("reshape", (x, (*shape[:axis], self.ranks, want.size, *shape[axis + 1 :])))
            x = apply("moveaxis", (x, axis, 0))
        part = [*shape]
        part[axis] = want.size
        if axis:
            x = apply("reshape", (x, (self.ranks * math.prod(part[: axis + 1]), *part[axis + 1 :])))
        found = Tensor(self._collective("sum_scatter", x.value, value, PARTIAL, reader))
        return _value(apply("reshape", (found, tuple(part))) if axis else found)

    # What ways to carry out an op across its axis are made of.

    def talk(self, op: str, local: Value, node: Node) -> Value:
        """A collective of a node's own."""
        nbytes = local.type.nbytes * (self.ranks if op == "all_gather" else 1)
        expected = f"{nbytes} bytes, {1e6 * self.costs.mesh.seconds(op, nbytes):.0f} µs"
        what, why = f"{op} of {local.type} in {node.op}", f"{node.op} is over a split axis: "
        record(Entry(_NAME, "inserted", what, node.origin, f"{why}{expected} expected"))
        args = (Tensor(local),) if op in _ON_WHOLE else (Tensor(local), self.ranks)
        made = _value(apply(f"distributed.{op}", args)).node
        return made.replace(kernel=f"{op} over {self.costs.mesh.backend}, {expected}").output

    def gathered(self, local: Value, node: Node) -> Value:
        """(ranks, …) of what each rank has."""
        one = apply("expand_dims", (Tensor(local), 0)).value
        return self.talk("all_gather", one, node)

    def part_of(self, whole: Value, place: Placement) -> Value:
        """This rank's part of what all hold."""
        return self._part(whole, place)

    def rank(self) -> Value:
        """The number of the rank that runs this, int32 without axes."""
        if self._rank is None:
            numbers = Tensor(constant_value(mx.arange(self.ranks, dtype=mx.int32), "ranks"))
            one = apply("distributed.part", (numbers, 0, 1, self.ranks))
            self._rank = _value(apply("reshape", (one, ())))
        return self._rank

    # What is the same at every call.

    def _fixed(self, value: Value, place: Placement) -> Value:
        """A weight, or what is computed from weights alone; computed in parts if it can be."""
        if value in self._slices:
            return self._slice(value, place)
        have = self._have.setdefault(value, {REPLICATED: value})
        if place in have:
            return have[place]
        with stating(value.node.origin.by(_NAME)):
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
                self._pads[fresh] = 0.0
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
            results: Sequence[Value] = self._loop(node, way)
        elif node.op in ("shard", "replicate"):
            results = [self.get(node.operand("x"), way.needs[0], node)]
        elif way.build is not None:
            local = [self.get(v, p, node) for v, p in zip(node.inputs, way.needs, strict=True)]
            results = way.build(self, node, local)
        else:
            results = self._same_op(node, way)
        for value, place, new in zip(node.outputs, way.gives, results, strict=True):
            self._have[value] = {place: new}

    def _same_op(self, node: Node, way: Strategy) -> Sequence[Value]:
        local = [self.get(v, p, node) for v, p in zip(node.inputs, way.needs, strict=True)]
        local = self._without_pads(node, way, local)
        types = [local_type(v.type, p) for v, p in zip(node.outputs, way.gives, strict=True)]
        spec = self.search.units.spec(node)
        changed: Mapping[str, Any] = {}
        is_split = any(p.kind == "split" for p in (*way.needs, *way.gives))
        if spec is not None and spec.local_args is not None and is_split:
            changed = spec.local_args(node, [v.type for v in local], types)
        new = rebuilt(node, local, changed)
        for out, value, place in zip(new.outputs, node.outputs, way.gives, strict=True):
            if self._is_padded(value, place):
                self._pads[out] = self._pad_of(node, way, local)
        return new.outputs

    def look_up(self, node: Node, local: Sequence[Value], index: int, size: int) -> Sequence[Value]:
        """A look-up in a rank's rows of a table; of rows that it does not hold, some other row."""
        given = list(local)
        key = (local[index], size)
        if key not in self._near:
            indices = Tensor(local[index])
            mine = apply("subtract", (indices.astype(mx.int32), self.first_row(size)))
            self._near[key] = _value(apply("clip", (mine, 0, size - 1)).astype(indices.dtype))
        given[index] = self._near[key]
        return rebuilt(node, given, {}).outputs

    def first_row(self, size: int) -> Tensor:
        found: Tensor = apply("multiply", (Tensor(self.rank()), size))
        return found

    def _where_owned(self, local: Value, one: Placement) -> Value:
        """Zeros in place of the rows that another rank owns."""
        assert one.indices is not None
        if one not in self._owner:
            indices = Tensor(self.get(one.indices, REPLICATED, None)).astype(mx.int32)
            place = apply("floor_divide", (indices, one.size))
            self._owner[one] = _value(apply("equal", (place, Tensor(self.rank()))))
        mine = Tensor(self._owner[one])
        more = local.ndim - mine.ndim
        mine = apply("reshape", (mine, (*mine.shape, *(1,) * more)))
        return _value(apply("where", (mine, Tensor(local), _zero(local))))

    # What stands beyond the end of a value that does not divide evenly.

    def _is_padded(self, value: Value, place: Placement) -> bool:
        return place.kind == "split" and value.shape[place.axis] != place.size * self.ranks

    def _without_pads(self, node: Node, way: Strategy, local: list[Value]) -> list[Value]:
        """Operands whose padding adds nothing to a sum along the split axis."""
        if not way.contracted:
            return local
        padded = [i for i in way.contracted if self._is_padded(node.inputs[i], way.needs[i])]
        if not padded:
            return local
        pads = {i: self._pads.get(local[i]) for i in padded}
        found = list(local)
        finite = all(p is not None and math.isfinite(p) for p in pads.values())
        if finite and 0.0 in pads.values():
            return local
        for i in padded:
            if pads[i] is None or not math.isfinite(pads[i] or 0.0) or 0.0 not in pads.values():
                found[i] = self.filled_beyond(node.inputs[i], local[i], way.needs[i], 0.0)
                pads[i] = 0.0
        return found

    def filled_beyond(self, value: Value, local: Value, place: Placement, number: float) -> Value:
        """The part with `number` wherever it reaches beyond the value's end."""
        if not self._is_padded(value, place) or self._pads.get(local) == number:
            return local
        places = apply("add", (Tensor(self._numbers(place.size)), self.first_row(place.size)))
        inside = apply("less", (places, value.shape[place.axis]))
        after = value.ndim - 1 - place.axis
        inside = apply("reshape", (inside, (place.size, *(1,) * after)))
        other = Tensor(constant_value(mx.array(number, local.dtype)))
        found = _value(apply("where", (inside, Tensor(local), other)))
        self._pads[found] = number
        return found

    def _numbers(self, count: int) -> Value:
        return constant_value(mx.arange(count, dtype=mx.int32))

    def _pad_of(self, node: Node, way: Strategy, local: Sequence[Value]) -> float | None:
        """The number that stands in a result's padding; None where it may be any."""
        here = [
            (self._pads.get(v), new)
            for v, p, new in zip(local, way.needs, node.inputs, strict=True)
            if p.kind == "split"
        ]
        pads = {pad for pad, _ in here}
        if node.op in ("zeros", "zeros_like"):
            return 0.0
        if not here:
            return None
        if pads == {0.0} and (node.op in _KEEPS_ZEROS or OPS[node.op].kind in _PRODUCT_KINDS):
            return 0.0
        if node.op == "fast.scaled_dot_product_attention" and self._pads.get(local[2]) == 0.0:
            return 0.0 if pads == {0.0} else None
        if node.op in _LAYOUT:
            return pads.pop() if len(pads) == 1 and len(here) >= 1 else None
        if OPS[node.op].kind.startswith("elementwise") and None not in pads:
            return self._pointwise_pad(node, way, local)
        return None

    def _pointwise_pad(self, node: Node, way: Strategy, local: Sequence[Value]) -> float | None:
        numbers: list[mx.array] = []
        for value, place, new in zip(node.inputs, way.needs, local, strict=True):
            if place.kind == "split":
                pad = self._pads.get(new)
                assert pad is not None
                numbers.append(mx.array(pad, value.dtype))
            elif is_scalar(value):
                numbers.append(value.node.args["data"].array)
            else:
                return None
        given = iter(numbers)
        args = {n: map_values(a, lambda _: next(given)) for n, a in node.args.items()}
        result = OPS[node.op].call(args)
        if isinstance(result, mx.array) and mx.issubdtype(result.dtype, mx.floating):
            return float(result.item())  # type: ignore[arg-type]
        return None

    # Loops.

    def _loop(self, node: Node, way: Strategy) -> Sequence[Value]:
        parts = bodies(node)
        inner = self.chosen.bodies[node]
        args = dict(node.args)
        count = iter(zip(node.inputs, way.needs, strict=True))
        for name, arg in node.args.items():
            args[name] = map_values(arg, lambda v: self.get(v, next(count)[1], node))
        graphs = []
        for body, chosen in zip(parts, inner, strict=True):
            inputs = {
                v: input_value(local_type(v.type, p), v.node.args["name"])
                for v, p in chosen.inputs.items()
                if p.kind == "split"
            }
            spread = Spreading(body.graph, chosen, self.search, inputs)
            fixed = [v for v in body.slices if v in self.search.fixed]
            results = spread.run(fixed)
            own = [inputs.get(v, v) for v in (*body.counter, *body.carried)]
            if body.slices:
                taken, args["xs"] = self._xs(node, body.slices, spread)
                own += taken
            outer = [inner_value for inner_value, _ in body.shared]
            graphs.append(finished(body.graph, [*own, *outer], results))
        types = [local_type(v.type, p) for v, p in zip(node.outputs, way.gives, strict=True)]
        return node.replace(args=args, bodies=tuple(graphs), types=types).outputs

    def _xs(
        self, node: Node, slices: Sequence[Value], spread: Spreading
    ) -> tuple[list[Value], tuple[Value, ...]]:
        """What a scan slices, in each placement that its body wants the slices in."""
        taken, given = [], []
        for value, stack in zip(slices, node.args["xs"], strict=True):
            if value not in self.search.fixed:
                taken.append(value)
                given.append(self.get(stack, REPLICATED, node))
                continue
            for (asked, place), new in spread.slices.items():
                if asked is value:
                    whole = place._replace(axis=place.axis + 1) if place != REPLICATED else place
                    taken.append(new)
                    given.append(self._fixed(stack, whole))
        return taken, tuple(given)


_ON_WHOLE = frozenset({"all_sum", "all_max", "all_min"})
"""Collectives that need not be told how many ranks there are."""

_PRODUCT_KINDS = frozenset({"product", "quantization", "convolution"})


def rebuilt(node: Node, local: Sequence[Value], changed: Mapping[str, Any]) -> Node:
    """The node on other operands, its types inferred anew; this very node if they are its own."""
    if not changed and all(new is old for new, old in zip(local, node.inputs, strict=True)):
        return node
    given = iter(local)
    args = {n: map_values(a, lambda _: next(given)) for n, a in node.args.items()}
    args |= changed
    return node.replace(args=args, types=infer(OPS[node.op], args)[0])


def finished(graph: Graph, inputs: Sequence[Value], outputs: Sequence[Value]) -> Graph:
    """The graph of what `outputs` need, in the order in which nodes were made."""
    return graph.replace(inputs=inputs, nodes=in_order(outputs, inputs), outputs=outputs)


def _value(tensor: Tensor) -> Value:
    return tensor.value


def _zero(like: Value) -> Tensor:
    return Tensor(constant_value(mx.zeros((), like.dtype)))


_WHY = {
    "partial": "it is partial sums",
    "split": "each rank holds a part of it",
    "owned": "each rank looked up the rows that it holds",
}


def _entry(op: str, value: Value, one: Placement, reader: Node | None, expected: str) -> Entry:
    needs = "the graph gives it" if reader is None else f"{reader.op} needs it"
    what = f"{op} of {value.type} from {value.node.op}"
    reason = f"{_WHY[one.kind]}, and {needs} whole: {expected} expected"
    return Entry(_NAME, "inserted", what, value.node.origin, reason)
