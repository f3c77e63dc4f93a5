"""A program that is given a cache and gives it back takes a tail of it as well: nothing is copied.

`tail-caches` does this for the turns of a loop.  A program of one token is called from outside,
where the GPU still holds the cache of the step before, so that each token copied all caches.

Rewrites:
    1. a state that one `cached_attention` updates and nothing else reads: in its place stands
       `tail_attention`.  The graph takes, after its own inputs, the tail's keys and values for each
       such cache, and the tail's positions for all that are written at the same position; after its
       own outputs it gives what these are then.  Its own outputs stay what they were: `merge_tail`
       makes them, and on a GPU nothing is computed that nobody asks for.
Leaves alone:
    1. graphs that are given no states, or no rows.
    2. caches that something else reads, before or after the update, and those inside loops; the
       ledger names the former.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qgraph.ir.graph import Graph, Value, input_value
from qgraph.rewrite.ledger import Entry, record
from qgraph.tracing.tensor import Tensor, apply

from .shared.tails import ATTENTION, Cache, caches_of, tail_attention
from .shared.views import without_views

_NAME = "tail-states"


@dataclass(frozen=True)
class TailStates:
    """See the module.

    Attributes:
        states: numbers of an input, and of the output that it is at the next call.
        rows: of each tail.
    """

    states: tuple[tuple[int, int], ...] = ()
    rows: int = 0
    name: str = _NAME
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        if not self.states or not self.rows:
            return graph
        pairs = [(graph.inputs[i], o) for i, o in self.states]
        found = caches_of(graph, pairs)
        fused = {cache.attention for cache in found}
        for node in graph.nodes:
            if node.op == ATTENTION:
                types = tuple(node.operand(name).type for name in ("q", "keys"))
                if node in fused:
                    why = f"the program takes a tail of {self.rows} rows beside its cache"
                    record(Entry.of(node, _NAME, "fused", why, types=types))
                else:
                    why = "its cache is copied: it is no state, or something else reads it"
                    record(Entry.of(node, _NAME, "refused", why, types=types))
        if not found:
            return graph
        return _with_tails(graph, found, [o for _, o in pairs], self.rows)


def _with_tails(graph: Graph, caches: Sequence[Cache], ends: Sequence[int], rows: int) -> Graph:
    of = {cache.attention: cache for cache in caches}
    inputs, after = list(graph.inputs), list(graph.outputs)
    tails: list[Value] = []
    positions: dict[Value, tuple[Value, Value]] = {}  # by the position: before and after
    replace: dict[Value, Value] = {}
    nodes = []
    for node in graph.nodes:
        new = node.with_inputs(replace)
        cache = of.get(node)
        if cache is None:
            nodes.append(new)
            replace.update(
                (a, b) for a, b in zip(node.outputs, new.outputs, strict=True) if a is not b
            )
            continue
        own, at = cache.tail(rows)
        given = [node.operand(name) for name in ("keys", "values")]
        tail = [input_value(own, f"tail.{v.node.args['name']}") for v in given]
        where = without_views(node.operand("position"))
        first = where not in positions
        before = input_value(at, f"tail.{len(positions)}") if first else positions[where][0]
        made = tail_attention(new, [*tail, before], _NAME)
        if first:
            positions[where] = before, made.outputs[3]
        nodes.append(made)
        replace[node.outputs[0]] = made.outputs[0]
        for value, stored, place in zip(given, made.outputs[1:3], cache.places, strict=True):
            operands = tuple(map(Tensor, (value, stored, made.outputs[3])))
            merge = apply("merge_tail", operands).value.node.replace(origin=made.origin)
            nodes.append(merge)
            after[ends[place]] = merge.output
        inputs += tail
        tails += made.outputs[1:3]
    return graph.replace(
        inputs=[*inputs, *(v for v, _ in positions.values())],
        nodes=nodes,
        outputs=[*(replace.get(v, v) for v in after), *tails, *(v for _, v in positions.values())],
        in_tree=None,
        out_tree=None,
    )
