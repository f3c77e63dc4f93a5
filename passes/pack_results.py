"""What a region on CUDA gives to regions alone becomes one array of each dtype.

MLX keeps for each result of a kernel a list of all the others, so the time that the host takes for
a launch grows with their square.

Rewrites:
    1. results of a region that only regions read, of the same turn or, carried by a loop, of the
       next: they lie one after the other in one array.  Regions take it apart and put it together,
       which is no operation for their back end, only addresses.
    2. what the loop starts with is put together where it is constant; after the loop the parts are
       taken out of the array.
Leaves alone:
    1. what something else in the turn reads, what a loop gives twice, and what it does not start
       from constants: to put that together would be a copy for each.
    2. parts after which another would not begin at 16 bytes.
    3. a single result of a dtype, and regions outside of loops.
    4. regions of other back ends than CUDA's, and whatever that one refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx

from qgraph.ir.graph import Graph, Node, Value, input_value
from qgraph.ir.loops import REGION, Body, bodies
from qgraph.rewrite.ledger import Entry, record
from qgraph.rewrite.rewriter import rewrite_each
from qgraph.runtime.regions.cuda.region import KERNEL
from qgraph.runtime.regions.cuda.translate import translate
from qgraph.runtime.regions.unknown import Unknown
from qgraph.tracing.tensor import Tensor, apply, as_tensor
from qgraph.types import TensorType

_NAME = "pack-results"
ALIGNED = 16
"""Bytes."""


@dataclass(frozen=True)
class PackResults:
    """See the module."""

    name: str = _NAME
    contract: str = "exact"

    def __call__(self, graph: Graph) -> Graph:
        return rewrite_each(graph, _visit, self.name, ("scan", "fori_loop"))


def _visit(node: Node) -> Sequence[Value] | None:
    (body,) = bodies(node)
    packs = list(_packs(node, body))
    if not packs:
        return None
    try:
        return _Packing(node, body, packs).run()
    except Unknown as error:
        record(Entry.of(node, _NAME, "refused", str(error), types=()))
        return None


def _is_launched(node: Node) -> bool:
    return node.op == REGION and node.kernel == KERNEL


@dataclass(frozen=True, eq=False)
class _Pack:
    """Results of a region that lie in one array; of those that are carried, their places."""

    region: Node
    parts: list[Value]
    carried: dict[Value, int]

    @property
    def type(self) -> TensorType:
        return TensorType((sum(v.type.size for v in self.parts),), self.parts[0].dtype)


def _packs(node: Node, body: Body) -> Iterator[_Pack]:
    users, outputs = body.graph.users, body.graph.outputs

    def only_regions(value: Value) -> bool:
        return all(map(_is_launched, users.get(value, ())))

    def place(value: Value) -> int | None:
        """Among what is carried, -1 for what is not; None where it must stay alone."""
        if value.type.nbytes % ALIGNED or not only_regions(value):
            return None
        if value not in outputs:
            return -1 if users.get(value) else None
        i = outputs.index(value)
        if outputs.count(value) > 1 or i >= len(body.carried):
            return None
        before = body.carried[i]
        starts = node.args["carried"][i].node.op == "constant"
        fine = starts and only_regions(before) and before not in outputs
        return i if fine else None

    for region in filter(_is_launched, body.graph.nodes):
        places = {v: i for v in region.outputs if (i := place(v)) is not None}
        for dtype in dict.fromkeys(v.dtype for v in places):
            parts = [v for v in places if v.dtype == dtype]
            if len(parts) > 1:
                yield _Pack(region, parts, {v: places[v] for v in parts if places[v] >= 0})


class _Packing:
    def __init__(self, node: Node, body: Body, packs: Sequence[_Pack]) -> None:
        self.node, self.body, self.packs = node, body, packs
        self.of = {v: pack for pack in packs for v in pack.parts}
        """The array that a result lies in."""
        self.before = {pack: input_value(pack.type, "packed") for pack in packs if pack.carried}
        self.starts = {
            body.carried[i]: (pack, v) for pack in packs for v, i in pack.carried.items()
        }
        """What is carried and lies in the array of the turn before."""
        self.after: dict[_Pack, Value] = {}
        self.replace: dict[Value, Value] = {}

    def run(self) -> list[Value]:
        """The results of the loop over packed values."""
        node, body, graph = self.node, self.body, self.body.graph
        nodes = []
        for n in graph.nodes:
            new = self._region(n) if _is_launched(n) else n.with_inputs(self.replace)
            nodes.append(new)
            if not _is_launched(n):
                self.replace.update(
                    (a, b) for a, b in zip(n.outputs, new.outputs, strict=True) if a is not b
                )
        kept = [i for i, v in enumerate(body.carried) if v not in self.starts]
        count, packs = len(body.carried), list(self.before)
        results = [self.replace.get(v, v) for v in graph.outputs]
        new_body = graph.replace(
            inputs=[*body.counter, *(body.carried[i] for i in kept), *self.before.values(),
                    *body.slices, *(v for v, _ in body.shared)],
            nodes=nodes,
            outputs=[*(results[i] for i in kept), *(self.after[p] for p in packs),
                     *results[count:]],
        )  # fmt: skip
        given, types = node.args["carried"], [v.type for v in node.outputs]
        loop = node.replace(
            args={**node.args, "carried": (*(given[i] for i in kept), *map(self._start, packs))},
            bodies=[new_body],
            types=[*(types[i] for i in kept), *(pack.type for pack in packs), *types[count:]],
        )
        found = dict(zip(kept, loop.outputs, strict=False))
        for pack, made in zip(packs, loop.outputs[len(kept) :], strict=False):
            starts = dict(zip(pack.parts, _ends(pack.parts), strict=True))
            for value, i in pack.carried.items():
                stop = starts[value]
                part = Tensor(made)[stop - value.type.size : stop]
                found[i] = apply("reshape", (part,), {"shape": value.shape}).value
        for pack in self.packs:
            detail = f"{len(pack.parts)} results of {pack.parts[0].dtype} lie in one array"
            record(Entry.of(pack.region, _NAME, "fused", detail, types=()))
        return [*(found[i] for i in range(count)), *loop.outputs[len(kept) + len(packs) :]]

    def _start(self, pack: _Pack) -> Value:
        """What the loop starts with; of what it does not carry, anything."""
        parts = []
        for value in pack.parts:
            if value in pack.carried:
                start = self.node.args["carried"][pack.carried[value]]
                parts.append(start.node.args["data"].array.reshape(-1))
            else:
                parts.append(mx.zeros((value.type.size,), value.dtype))
        return as_tensor(mx.concatenate(parts)).value

    def _region(self, region: Node) -> Node:
        """A region that takes packed values apart, and puts its results together."""
        (inside,) = region.bodies
        outer: dict[Value, Value] = {}  # and the inner value that stands for it
        parts: dict[Value, dict[Value, Value]] = {}  # of what comes packed
        replace: dict[Value, Value] = {}
        first: list[Node] = []
        for given, inner in zip(region.args["invariants"], inside.inputs, strict=True):
            pack, value = self.starts.get(given, (self.of.get(given), given))
            if pack is None:
                outer[self.replace.get(given, given)] = inner
                continue
            whole = self.before[pack] if given in self.starts else self.after[pack]
            if whole not in parts:
                outer[whole] = input_value(pack.type, "packed")
                parts[whole] = dict(zip(pack.parts, _apart(outer[whole], pack.parts), strict=True))
                some = next(iter(parts[whole].values()))
                first += [some.node.inputs[0].node, *(v.node for v in parts[whole].values())]
            replace[inner] = parts[whole][value]
        nodes = []
        for n in inside.nodes:
            new = n.with_inputs(replace)
            nodes.append(new)
            replace.update(
                (a, b) for a, b in zip(n.outputs, new.outputs, strict=True) if a is not b
            )

        made = dict(zip(region.outputs, inside.outputs, strict=True))
        own = [pack for pack in self.packs if pack.region is region]
        alone = [v for v in region.outputs if v not in self.of]
        last, wholes = [], []
        for pack in own:
            flat = [
                apply("reshape", (Tensor(replace.get(made[v], made[v])),), {"shape": (-1,)})
                for v in pack.parts
            ]
            wholes.append(apply("concatenate", (flat,), {"axis": 0}).value)
            last += [*(row.value.node for row in flat), wholes[-1].node]
        new_inside = inside.replace(
            inputs=list(outer.values()),
            nodes=[*first, *nodes, *last],
            outputs=[*(replace.get(made[v], made[v]) for v in alone), *wholes],
        )
        translate(new_inside)
        new_region = region.replace(
            args={**region.args, "invariants": tuple(outer)},
            bodies=[new_inside],
            types=[*(v.type for v in alone), *(pack.type for pack in own)],
        )
        self.replace.update(zip(alone, new_region.outputs, strict=False))
        self.after.update(zip(own, new_region.outputs[len(alone) :], strict=True))
        return new_region


def _ends(values: Sequence[Value]) -> tuple[int, ...]:
    return tuple(accumulate(v.type.size for v in values))


def _apart(flat: Value, like: Sequence[Value]) -> list[Value]:
    args = {"indices_or_sections": _ends(like)[:-1], "axis": 0}
    parts = apply("split", (Tensor(flat),), args)
    return [
        apply("reshape", (part,), {"shape": v.shape}).value
        for part, v in zip(parts, like, strict=True)
    ]
