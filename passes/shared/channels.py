"""Where the channels of a weight go, and whether factors on them may move into what reads them.

Dividing channel c of a weight by t[c] changes what is computed from it. It may be made up for where
each number that follows from it stays the number it was, divided by one t[c], until a product with
another weight sums over it: that weight's columns, multiplied by the same t[c], give the product
that was. A norm's weight, the rows of a linear layer, a vector that is multiplied in: they all are
weights with channels, and one walk through their readers proves it for each.

Channels are followed as arrays of whole numbers, of the shape of each value, that say whose factor
each of its elements has.

Followed:
    1. views, casts to floats, and rows that are picked by index.
    2. products with, and quotients by, anything that has no factors itself; negation.
    3. a constant that is added: it is divided as well.
    4. the weight, and a constant bias, of `fast.rms_norm` and `fast.layer_norm`.
    5. `matmul`, `addmm` and `gather_mm` with the weight they come from.
    6. the same with another constant weight, over the channels: there they end.
Refused, with the reader that is in the way:
    1. any other op: it does not commute with factors.
    2. an op that reads two values with factors, as a square does.
    3. a sum with what is no constant, or with one that something else reads.
    4. attention and other products of two values: what they read may be a cache that other programs
       of the model share.
    5. a weight at the end that something else reads too, as an embedding that is the head.
    6. results of the graph, and loops.
    7. weights that nothing multiplies.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from qgraph.analysis.changes import behind_views, readers
from qgraph.ir.graph import Graph, Node, Value, is_constant
from qgraph.ir.kinds import SAME_ELEMENTS

from .indexing import index_of
from .weight_view import TRANSPOSES

Ids = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Channels:
    """Constants that factors go into.

    Attributes:
        count: how many channels, and so factors, there are.
        divided: whose factor divides each element, by constant.
        multiplied: whose factor multiplies each column of its last axis, by constant.
    """

    count: int
    divided: dict[Value, Ids]
    multiplied: dict[Value, Ids]


class Refused(Exception):
    """Factors may not move. `node` is in the way, where there is one."""

    def __init__(self, reason: str, node: Node | None = None) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


def follow(graph: Graph, weight: Value) -> Channels:
    """Where the channels of a constant go: elements of a vector, or rows of what has more axes.

    Raises:
        Refused: it cannot be proven that what is computed stays the same.

    >>> import qgraph as qg
    >>> w = qg.tensor(mx.ones(4)), qg.tensor(mx.ones((2, 4)))
    >>> graph = qg.trace(lambda x: qg.fast.rms_norm(x, w[0], 1e-5) @ w[1].T, qg.spec((1, 4)))
    >>> norm, matrix = (node.output for node in graph.constants()[:2])
    >>> [ids.tolist() for ids in follow(graph, norm).multiplied.values()]
    [[0, 1, 2, 3]]
    """
    walk = _Walk(graph)
    count = weight.shape[0] if weight.ndim == 1 else weight.shape[-2] if weight.ndim else 0
    ids = np.arange(count)
    walk.divide(weight, np.broadcast_to(ids if weight.ndim == 1 else ids[:, None], weight.shape))
    walk.carry(weight, walk.divided[weight])
    walk.run()
    if not walk.multiplied:
        raise Refused("no product with a weight reads it")
    walk.check_readers()
    return Channels(count, walk.divided, walk.multiplied)


@dataclass
class _Walk:
    graph: Graph
    divided: dict[Value, Ids] = field(default_factory=dict)
    multiplied: dict[Value, Ids] = field(default_factory=dict)
    ends: set[Node] = field(default_factory=set)
    ids: dict[Value, Ids] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pending: list[tuple[int, Node]] = []
        self.seen: set[Node] = set()

    def run(self) -> None:
        """From reader to reader, in the order in which nodes were made."""
        while self.pending:
            _, node = heapq.heappop(self.pending)
            if node.bodies:
                raise Refused(f"{node.op} reads it, and loops are not followed", node)
            rule = _RULES.get(node.op)
            if rule is None:
                raise Refused(f"{node.op} does not commute with factors", node)
            found = rule(self, node)
            if found is not None:
                self.carry(node.output, found)

    def carry(self, value: Value, ids: Ids) -> None:
        """Note whose factors a value has, and come to what reads it."""
        if value in self.graph.outputs:
            raise Refused("it is a result of the graph", value.node)
        self.ids[value] = ids
        for node in self.graph.users.get(value, ()):
            if node not in self.seen:
                self.seen.add(node)
                heapq.heappush(self.pending, (node.serial, node))

    def divide(self, constant: Value, ids: Ids) -> None:
        if constant in self.divided or constant in self.multiplied:
            raise Refused(f"{constant.node.args['name'] or 'a constant'} would be scaled twice")
        self.divided[constant] = ids

    def end(self, node: Node, operand: Value, columns: Ids) -> None:
        """A product over channels with a weight, whose columns take the factors."""
        weight, places = _behind(operand)
        if weight is None or weight in self.divided:
            raise Refused(f"{node.op} multiplies it by what is no weight", node)
        summed = places[(0,) * (places.ndim - 2)][:, 0]
        if _varies(places, *range(places.ndim - 2), -1) or len({*summed.tolist()}) < len(columns):
            raise Refused(f"{node.op} does not sum over the last axis of its weight", node)
        found = np.empty(len(columns), np.int64)
        found[summed] = columns
        if not np.array_equal(self.multiplied.setdefault(weight, found), found):
            raise Refused(f"{node.op} reads a weight again in another order", node)
        if sum(behind_views(v) is weight for v in node.inputs) > 1:
            raise Refused(f"{node.op} reads its weight twice", node)
        self.ends.add(node)

    def check_readers(self) -> None:
        """Nothing but the products that end channels may read the weights that take factors."""
        for weight in self.multiplied:
            for node in readers(self.graph, weight):
                if node not in self.ends:
                    name = weight.node.args["name"] or "a constant"
                    raise Refused(f"{node.op} reads {name} too", node)
        if any(behind_views(value) in self.multiplied for value in self.graph.outputs):
            raise Refused("a weight is a result of the graph")


def _only(walk: _Walk, node: Node, *names: str) -> str:
    """Which of the operands has factors; no other may."""
    found = [n for n, arg in node.args.items() if isinstance(arg, Value) and arg in walk.ids]
    if len(found) != 1 or found[0] not in names:
        raise Refused(f"{node.op} reads it as {' and '.join(found)}", node)
    return found[0]


def _varies(ids: Ids, *axes: int) -> bool:
    """Do ids differ along some of these axes?"""
    moving = [a % ids.ndim for a in axes if ids.strides[a] and ids.shape[a] > 1]
    return any(bool((ids != np.take(ids, [0], axis)).any()) for axis in moving)


def _view(walk: _Walk, node: Node) -> Ids:
    if not mx.issubdtype(node.output.dtype, mx.floating):
        raise Refused(f"it is cast to {node.output.dtype}", node)
    return _viewed(walk.ids[node.inputs[0]], node)


def _viewed(ids: Ids, node: Node) -> Ids:
    """A view of the table of ops on an array of NumPy's."""
    if node.op in TRANSPOSES:
        return TRANSPOSES[node.op](ids, node)
    if node.op == "broadcast_to":
        return np.broadcast_to(ids, node.output.shape)
    return ids if ids.shape == node.output.shape else ids.reshape(node.output.shape)


def _behind(value: Value) -> tuple[Value | None, Ids]:
    """The constant weight that a value is a view of, and which column of it each element is."""
    chain: list[Node] = []
    while value.node.op in SAME_ELEMENTS:
        chain.append(value.node)
        value = value.node.inputs[0]
    if not is_constant(value) or value.ndim < 2:
        return None, np.empty(0)
    places: Ids = np.broadcast_to(np.arange(value.shape[-1]), value.shape)
    for node in reversed(chain):
        places = _viewed(places, node)
    return value, places


def _picked(walk: _Walk, node: Node) -> Ids:
    """Rows by index: whose factors they have must not depend on which they are."""
    name = _only(walk, node, "a")
    ids = walk.ids[node.operand(name)]
    last = ids.ndim - 1
    if node.op == "take":
        axis = node.args.get("axis")
        whole = axis is not None and axis % ids.ndim != last
    else:
        parts = index_of(node)
        whole = len(parts) <= last and all(p is not Ellipsis for p in parts)
    if not whole or _varies(ids, *range(last)):
        raise Refused(f"{node.op} picks among channels", node)
    return np.broadcast_to(ids[(0,) * last], node.output.shape)


def _scaled(walk: _Walk, node: Node) -> Ids:
    _only(walk, node, "a", *(("b",) if node.op == "multiply" else ()))
    (ids,) = (walk.ids[v] for v in node.inputs if v in walk.ids)
    return np.broadcast_to(ids, node.output.shape)


def _added(walk: _Walk, node: Node) -> Ids:
    name = _only(walk, node, "a", "b")
    ids = np.broadcast_to(walk.ids[node.operand(name)], node.output.shape)
    _divide_too(walk, node, node.operand("b" if name == "a" else "a"), ids)
    return ids


def _divide_too(walk: _Walk, node: Node, other: Value, ids: Ids) -> None:
    """A constant that is added to numbers with these factors."""
    if not is_constant(other):
        raise Refused(f"{node.op} adds what is no constant", node)
    if len(walk.graph.users[other]) > 1 or node.inputs.count(other) > 1:
        raise Refused(f"{node.op} adds {other.node.args['name']}, which is read elsewhere", node)
    spread = [ids.ndim - 1 - i for i in range(ids.ndim) if (other.shape[::-1] + (1,) * 9)[i] == 1]
    if _varies(ids, *spread):
        raise Refused(f"{node.op} adds one number to several channels", node)
    index = tuple(slice(0, 1) if axis in spread else slice(None) for axis in range(ids.ndim))
    walk.divide(other, ids[index].reshape(other.shape))


def _norm(walk: _Walk, node: Node) -> Ids:
    _only(walk, node, "weight")
    ids = np.broadcast_to(walk.ids[node.operand("weight")], node.output.shape)
    bias = node.value("bias")
    if bias is not None:
        _divide_too(walk, node, bias, ids)
    return ids


def _product(walk: _Walk, node: Node) -> Ids | None:
    if _only(walk, node, "a", "b") == "a":
        a = walk.ids[node.operand("a")]
        if _varies(a, *range(a.ndim - 1)):
            raise Refused(f"{node.op} sums over channels in different orders", node)
        walk.end(node, node.operand("b"), a[(0,) * (a.ndim - 1)])
        return None
    b = node.operand("b")
    if behind_views(b) not in walk.divided:
        raise Refused(f"{node.op} multiplies two values that change from call to call", node)
    ids = walk.ids[b]
    if _varies(ids, *range(ids.ndim - 1)):
        raise Refused(f"{node.op} sums over channels", node)
    ids = np.broadcast_to(ids[(0,) * (ids.ndim - 1)], node.output.shape)
    c = node.value("c")
    if c is not None:
        _divide_too(walk, node, c, ids)
    return ids


_RULES: dict[str, Callable[[_Walk, Node], Ids | None]] = {
    **dict.fromkeys(SAME_ELEMENTS - {"shard", "replicate"}, _view),
    **dict.fromkeys(("take", "getitem"), _picked),
    **dict.fromkeys(("multiply", "divide", "negative"), _scaled),
    **dict.fromkeys(("add", "subtract"), _added),
    **dict.fromkeys(("fast.rms_norm", "fast.layer_norm"), _norm),
    **dict.fromkeys(("matmul", "addmm", "gather_mm"), _product),
}
