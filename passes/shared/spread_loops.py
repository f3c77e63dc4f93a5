"""Loops and branches on a mesh: each body is spread, and what is carried lies in one way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from qgraph.analysis.placements import REPLICATED, Placement, local_type
from qgraph.analysis.placements.assignment import Assignment
from qgraph.analysis.placements.strategies import Strategy
from qgraph.ir.graph import Graph, Node, Value, in_order, input_value, map_values
from qgraph.ir.loops import bodies


class Spread(Protocol):
    """A graph that is being spread, as `spreading.Spreading` does it.

    Attributes:
        slices: by slice of a weight and placement, the new input of a body that is it.
    """

    slices: dict[tuple[Value, Placement], Value]

    def run(self, slices: Sequence[Value] = ()) -> list[Value]: ...

    def get(self, value: Value, place: Placement, reader: Node | None) -> Value: ...


Inner = Callable[[Graph, Assignment, Mapping[Value, Value]], Spread]


def spread_loop(
    outer: Spread,
    node: Node,
    way: Strategy,
    chosen: Sequence[Assignment],
    fixed: Collection[Value],
    inner: Inner,
) -> Sequence[Value]:
    """The results of a loop on what a rank holds.

    Args:
        outer: the graph around it.
        chosen: for each body, its placements.
        fixed: values that are the same at every call: of a stack of weights a body may want parts.
        inner: begins to spread a body, some of whose inputs are others.
    """
    parts = bodies(node)
    args = dict(node.args)
    needs = iter(way.needs)
    for name, arg in node.args.items():
        args[name] = map_values(arg, lambda v: outer.get(v, next(needs), node))
    graphs = []
    for body, assignment in zip(parts, chosen, strict=True):
        inputs = {
            v: input_value(local_type(v.type, p), v.node.args["name"])
            for v, p in assignment.inputs.items()
            if p.kind == "split"
        }
        spread = inner(body.graph, assignment, inputs)
        results = spread.run([v for v in body.slices if v in fixed])
        own = [inputs.get(v, v) for v in (*body.counter, *body.carried)]
        if body.slices:
            taken, args["xs"] = _slices(outer, node, body.slices, fixed, spread)
            own += taken
        shared = [inner_value for inner_value, _ in body.shared]
        graphs.append(finished(body.graph, [*own, *shared], results))
    types = [local_type(v.type, p) for v, p in zip(node.outputs, way.gives, strict=True)]
    return node.replace(args=args, bodies=tuple(graphs), types=types).outputs


def _slices(
    outer: Spread, node: Node, slices: Sequence[Value], fixed: Collection[Value], spread: Spread
) -> tuple[list[Value], tuple[Value, ...]]:
    """What a scan slices, in each placement that its body wants the slices in."""
    taken, given = [], []
    for value, stack in zip(slices, node.args["xs"], strict=True):
        if value not in fixed:
            taken.append(value)
            given.append(outer.get(stack, REPLICATED, node))
            continue
        wanted = {p: new for (asked, p), new in spread.slices.items() if asked is value}
        for place, new in wanted.items():
            whole = place._replace(axis=place.axis + 1) if place != REPLICATED else place
            taken.append(new)
            given.append(outer.get(stack, whole, node))
    return taken, tuple(given)


def finished(graph: Graph, inputs: Sequence[Value], outputs: Sequence[Value]) -> Graph:
    """The graph of what `outputs` need, in the order in which nodes were made."""
    return graph.replace(inputs=inputs, nodes=in_order(outputs, inputs), outputs=outputs)
