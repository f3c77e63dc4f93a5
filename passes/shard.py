"""Spread a graph over the ranks of a mesh.

Each value is replicated, split along an axis, or partial sums; `analysis/placements` chooses which.

Rewrites (within the tolerance of sums in another order):
    1. products with weights: split along the weight's rows, or along whole groups of its columns
       into partial sums; convolutions by channels, attention by heads.
    2. whatever lies between, by the rule of its op: on the part that a rank holds.
    3. look-ups in tables and products with experts whose rows are split: each rank does its own.
    4. a collective where partial sums meet what is not linear, and where split meets replicated.
    5. weights and what is computed from them alone: each rank takes its part, computed in parts.
    6. loops: what is carried lies on the mesh in one way at every turn.
    7. what does not divide evenly: equal parts that reach beyond the end, zeros where sums run.
    8. products whose columns are cut apart, such as Q, K and V: a product for each.
    9. `qg.shard` and `qg.replicate`: as the user says.
Leaves alone:
    1. ops without a rule, and small ones that are cheaper to repeat: every rank carries them out.
    2. a graph with collectives of its own, which was written for one rank.
    3. inputs and results: every rank is given all of them, and gives all.
    4. branches: each rank carries them out whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qgraph.analysis.changes import fixed_values
from qgraph.analysis.meshes import is_collective
from qgraph.analysis.placements.costs import HELD, Costs
from qgraph.analysis.placements.search import Search
from qgraph.analysis.placements.ways import is_weight
from qgraph.ir.graph import Graph, Node, Value, is_constant
from qgraph.ir.loops import outermost
from qgraph.rewrite.ledger import Entry, record, weight_name
from qgraph.rewrite.rewriter import rewrite_each
from qgraph.target import Target, as_target

from .shared.columns import cut_products
from .shared.spread_loops import finished
from .shared.spreading import Spreading

_NAME = "shard"


@dataclass(frozen=True)
class Shard:
    """See the module.

    Args:
        target: with its mesh; without one, statements of placements are dropped.
        held: seconds that a byte of a weight is worth which a rank need not hold; by default much,
            and nothing where the mesh's goal is time.
        states: numbers of an input and the result that it is at the next call, such as a cache:
            they may lie on the mesh in any one way, as no call needs them whole.
    """

    target: Target | None = None
    held: float | None = None
    states: tuple[tuple[int, int], ...] = ()
    name: str = _NAME
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        target = as_target(self.target)
        if target.mesh is None or target.mesh.size == 1:
            return rewrite_each(graph, _without_statement, self.name, ("shard", "replicate"))
        if any(is_collective(node) for _, node in graph.walk()):
            what = f"graph {graph.name}"
            record(Entry(_NAME, "kept", what, reason="it has collectives of its own"))
            return graph
        written, graph = graph, cut_products(graph, fixed_values(graph), self.name)
        weights = sum(node.output.type.nbytes for _, node in graph.walk() if node.op == "constant")
        held = self.held
        if held is None:
            held = HELD if target.mesh.goal == "memory" else 0.0
        search = Search(graph, Costs(target, held, weights), fixed_values(graph))
        free = [graph.inputs[i] for i, _ in self.states]
        chosen = search.assign(graph, free, {j: n for n, (_, j) in enumerate(self.states)})
        spread = Spreading(graph, chosen, search, self.name)
        outputs = spread.run()
        if all(new is old for new, old in zip(outputs, graph.outputs, strict=True)):
            _tell_of_weights(written, written, search, target.mesh.size)
            return written
        new = finished(graph, graph.inputs, outputs)
        _tell_of_weights(written, new, search, target.mesh.size)
        return new


def _without_statement(node: Node) -> Sequence[Value]:
    return [node.operand("x")]


def _tell_of_weights(before: Graph, after: Graph, search: Search, ranks: int) -> None:
    """A line in the ledger for each weight: how it lies, and why if every rank holds all of it."""
    source = outermost(before) | outermost(after)
    parts: dict[Value, str] = {}
    whole: set[Value] = set()
    for _, node in after.walk():
        for value in node.inputs:
            weight = source.get(value, value)
            if node.op == "distributed.part":
                axis = node.args["axis"]
                beyond = node.output.shape[axis] * ranks - value.shape[axis]
                more = f", {beyond} beyond its end" if beyond else ""
                parts[weight] = f"along axis {axis}, {node.output.type} each{more}"
            elif not node.bodies:
                whole.add(weight)
    told: set[Value] = set()
    for _, node in before.walk():
        for value in node.inputs:
            weight = source.get(value, value)
            if weight in told or not is_constant(weight) or not is_weight(node, value):
                continue
            told.add(weight)
            what, name = str(weight.type), weight_name(weight)
            if weight in parts and weight not in whole:
                record(Entry(_NAME, "split", what, weight.node.origin, parts[weight], name=name))
            elif weight in whole:
                why = _why_whole(node, search)
                record(Entry(_NAME, "replicated", what, weight.node.origin, why, name=name))


def _why_whole(reader: Node, search: Search) -> str:
    if search.units.spec(reader) is None:
        return f"{reader.op} has no rule that splits it"
    return "it divides into no parts that its readers can use"
