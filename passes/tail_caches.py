"""A loop that carries a cache carries a tail of it: what its turns store, and nothing is copied.

`cached_attention` gives the caches after a token, which on CUDA are copies of those before: a
kernel cannot know who else holds an array.  After 16,000 tokens of Llama-8B's shape that is 64 MiB
a layer and turn, as much again as attention reads.

Rewrites:
    1. a cache that a loop carries, updated by one `cached_attention` a turn and read by nothing
       else, becomes an invariant; in the turns stands `tail_attention`, a tail of a row for each
       turn is carried in its place, and `merge_tail` makes the cache after the loop.
Leaves alone:
    1. loops of one turn, of more turns than a tail has rows, or of as many as only the run knows.
    2. caches that something else in the turn reads, before or after the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from qgraph.ir.graph import Graph, Node, Value, input_value
from qgraph.ir.loops import LOOPS, bodies, turns
from qgraph.kernels.attention.tail_attention import MOST_ROWS
from qgraph.rewrite.ledger import Entry, record
from qgraph.rewrite.rewriter import rewrite_each
from qgraph.tracing.tensor import Tensor, apply, as_tensor
from qgraph.types import TensorType

_NAME = "tail-caches"
_ATTENTION = "cached_attention"


@dataclass(frozen=True)
class TailCaches:
    """See the module."""

    name: str = _NAME
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite_each(graph, _visit, self.name, LOOPS)


@dataclass(frozen=True)
class _Cache:
    """Keys and values that a turn is given, and gives back with a token more.

    Attributes:
        places: of keys and values among what the loop carries.
        attention: the node that reads and updates them.
    """

    places: tuple[int, int]
    attention: Node

    def tail(self, rows: int) -> TensorType:
        """Of its keys, and of its values."""
        keys = self.attention.operand("keys").type
        return TensorType((*keys.shape[:2], rows, keys.shape[3]), keys.dtype)


def _visit(node: Node) -> Sequence[Value] | None:
    if _ATTENTION not in node.bodies[-1].ops:
        return None
    count = turns(node)
    if count is None or not 1 < count <= MOST_ROWS:
        why = (
            "only the run knows how often it turns" if count is None else f"it turns {count} times"
        )
        record(Entry.of(node, _NAME, "refused", f"caches are copied at each turn: {why}"))
        return None
    body = bodies(node)[-1]
    found = _caches_of(body.graph, body.carried)
    if not found:
        record(Entry.of(node, _NAME, "refused", "caches are copied at each turn: something else "
                        "reads them"))  # fmt: skip
        return None
    for cache in found:
        types = tuple(cache.attention.operand(name).type for name in ("q", "keys"))
        reason = f"the loop carries a tail of {count} rows"
        record(Entry.of(cache.attention, _NAME, "fused", reason, types=types))
    return _with_tails(node, found, count)


def _with_tails(node: Node, caches: Sequence[_Cache], rows: int) -> list[Value]:
    """The results of the loop over tails."""
    body = bodies(node)[-1]
    graph, args = body.graph, dict(node.args)
    of = {cache.attention: cache for cache in caches}
    gone = {i: cache for cache in caches for i in cache.places}
    starts: list[Value] = []  # of what is carried for the caches
    inputs: list[Value] = []
    ends: list[Value] = []
    shared = [body.carried[i] for i in gone]
    replace: dict[Value, Value] = {}
    nodes = []
    for inner in graph.nodes:
        new = inner.with_inputs(replace)
        if inner not in of:
            nodes.append(new)
            replace.update(
                (a, b) for a, b in zip(inner.outputs, new.outputs, strict=True) if a is not b
            )
            continue
        tail = of[inner].tail(rows)
        zeros = as_tensor(mx.zeros(tail.shape, tail.dtype)).value
        unused = as_tensor(mx.full((rows,), -1, mx.int32)).value
        own = [
            input_value(value.type, f"tail_{name}")
            for value, name in ((zeros, "keys"), (zeros, "values"), (unused, "positions"))
        ]
        attention = _tail_attention(new, own)
        nodes.append(attention)
        replace[inner.outputs[0]] = attention.outputs[0]
        starts += [zeros, zeros, unused]
        inputs += own
        ends += attention.outputs[1:]
    kept = [i for i in range(len(args["carried"])) if i not in gone]
    count = len(args["carried"])
    results = [replace.get(v, v) for v in graph.outputs]
    new_graph = graph.replace(
        inputs=[*body.counter, *(body.carried[i] for i in kept), *inputs, *body.slices,
                *(v for v, _ in body.shared), *shared],
        nodes=nodes,
        outputs=[*(results[i] for i in kept), *ends, *results[count:]],
    )  # fmt: skip
    args["invariants"] = (*args["invariants"], *(node.args["carried"][i] for i in gone))
    args["carried"] = (*(node.args["carried"][i] for i in kept), *starts)
    types = [v.type for v in node.outputs]
    types = [*(types[i] for i in kept), *(v.type for v in starts), *types[count:]]
    loop = node.replace(args=args, bodies=(*node.bodies[:-1], new_graph), types=types)

    after = dict(zip(kept, loop.outputs, strict=False))
    tails = loop.outputs[len(kept) : len(kept) + len(starts)]
    for n, cache in enumerate(caches):
        *made, positions = tails[3 * n : 3 * n + 3]
        for i, some in zip(cache.places, made, strict=True):
            operands = (Tensor(node.args["carried"][i]), Tensor(some), Tensor(positions))
            after[i] = apply("merge_tail", operands).value
    return [*(after[i] for i in range(count)), *loop.outputs[len(kept) + len(starts) :]]


def _caches_of(graph: Graph, carried: Sequence[Value]) -> list[_Cache]:
    """The caches that only their attention reads."""
    place = {value: i for i, value in enumerate(carried)}
    readers: dict[Value, list[Node | int]] = {}
    for node in graph.nodes:
        for value in node.inputs:
            readers.setdefault(value, []).append(node)
    for i, value in enumerate(graph.outputs):
        readers.setdefault(value, []).append(i)
    found = []
    for node in graph.nodes:
        if node.op != _ATTENTION:
            continue
        before = [node.operand(name) for name in ("keys", "values")]
        places = [place.get(value) for value in before]
        alone = all(
            i is not None and readers[value] == [node] and readers.get(after) == [i]
            for i, value, after in zip(places, before, node.outputs[1:], strict=True)
        )
        if alone:
            found.append(_Cache((place[before[0]], place[before[1]]), node))
    return found


def _tail_attention(attention: Node, tail: Sequence[Value]) -> Node:
    """What takes the place of a `cached_attention`.

    Args:
        tail: its keys, values and positions.
    """
    names = ("q", "k", "v", "keys", "values")
    operands = [*map(attention.operand, names), *tail]
    operands += map(attention.operand, ("position", "last"))
    rest = (attention.value(name) for name in ("freqs", "offset", "sinks"))
    given = (*operands, *rest)
    settings = ("heads", "rope", "scale", "window")
    results = apply(
        "tail_attention",
        tuple(None if v is None else Tensor(v) for v in given),
        {name: attention.args[name] for name in settings if name in attention.args},
    )
    made: Node = results[0].value.node
    return made.replace(stream=attention.stream, origin=attention.origin.by(_NAME))
