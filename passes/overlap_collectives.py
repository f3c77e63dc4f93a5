"""Rows of a prompt go in two halves: one is summed over the ranks while the other is computed.

All that lies between two attentions treats rows apart.  In halves, a sum over the ranks of the
first is under way beside the product of the second, and that of the second beside what comes next.

Rewrites (exact but for kernels that are chosen for fewer rows):
    1. an `all_sum` of many rows, and the product that it is of: both in halves of the rows.
    2. what comes after it and treats rows apart, if a product is reached: it is computed beside the
       second half's sum.
    3. where both halves are needed at once, as by an attention: they are joined.
Leaves alone:
    1. rows so few that another collective takes more time than is hidden.
    2. a product whose halves, joined, move more bytes than is hidden: logits of all rows.
    3. sums of what no product gives: there is nothing to compute beside them.
    4. what treats rows together, and rows of an odd number.
    5. CPUs: their regions wait for what they take.
    6. graphs without a mesh, or one that was not asked to (`qg.Mesh(…, overlap=True)`).

Runs after products are merged, before kernels are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from qgraph.analysis.placements.costs import BANDWIDTH
from qgraph.analysis.placements.rules import spec_of
from qgraph.analysis.placements.spec import Spec
from qgraph.ir.graph import Graph, Node, Value, in_order
from qgraph.mesh import Mesh
from qgraph.origin import stating
from qgraph.rewrite.ledger import Entry, record
from qgraph.target import Target, as_target
from qgraph.tracing.tensor import Tensor, apply
from qgraph.types import TensorType

from .shared.rebuilding import rebuilt

_NAME = "overlap-collectives"
_SUM = "distributed.all_sum"
_PRODUCTS = frozenset({"matmul", "addmm", "quantized_matmul"})


@dataclass(frozen=True)
class OverlapCollectives:
    """See the module."""

    target: Target | None = None
    name: str = _NAME
    contract: str = "tolerance"

    def __call__(self, graph: Graph) -> Graph:
        target = as_target(self.target)
        mesh = target.mesh
        if mesh is None or mesh.size == 1 or not mesh.overlap or target.is_cpu:
            return graph
        chosen = _Choice(graph, mesh, BANDWIDTH[target.backend])
        return _Halving(graph, chosen, mesh).run() if chosen.ways else graph


class Way(NamedTuple):
    """How a node is carried out in halves.

    Attributes:
        needs: for each input, the axis along which a half is taken; None where all of it is.
        gives: for each output, the axis of its halves.
    """

    needs: tuple[int | None, ...]
    gives: tuple[int, ...]
    spec: Spec | None = None


def _along(node: Node, value: Value, axis: int) -> Way | None:
    """In halves along an axis of one input or output; None if the op needs all of it at once."""
    if node.op == _SUM:
        return Way((axis,), (axis,)) if value.shape[axis] % 2 == 0 else None
    spec = spec_of(node)
    if spec is None:
        return None
    both = (*zip(node.inputs, spec.operands, strict=True),
            *zip(node.outputs, spec.results, strict=True))  # fmt: skip
    dim = next(dims[axis] for v, dims in both if v is value)
    if dim is None or dim.label in spec.sums | spec.whole or spec.units[dim.label] % 2:
        return None
    at = [next((i for i, d in enumerate(dims) if d and d.label == dim.label), None)
          for _, dims in both]  # fmt: skip
    needs, gives = at[: len(node.inputs)], at[len(node.inputs) :]
    if any(i is None for i in gives):
        return None
    return Way(tuple(needs), tuple(i for i in gives if i is not None), spec)


class _Choice:
    """Which nodes of a graph go in halves.

    Attributes:
        ways: how.
    """

    def __init__(self, graph: Graph, mesh: Mesh, bandwidth: float) -> None:
        self.ways: dict[Node, Way] = {}
        self._mesh = mesh
        self._axes: dict[Value, int] = {}
        begun: set[Node] = set()
        for node in graph.nodes:
            if node.op == _SUM and self._pays(node.output):
                begun |= self._begin(node)
            elif node not in self.ways:
                self._go_on(node)
        hidden = self._hidden()
        for node in reversed(graph.nodes):
            if node not in self.ways or node in begun:
                continue
            joined = 2 * sum(v.type.nbytes for v in node.outputs) / bandwidth
            is_last = node.op in _PRODUCTS and joined < hidden
            if not is_last and all(u not in self.ways for u in _users(graph, node)):
                del self.ways[node]

    def _pays(self, value: Value) -> bool:
        """Is more hidden, if of a sum but half of the time is, than a collective more takes?"""
        if value.ndim < 2 or value.shape[-2] % 2:
            return False
        whole = self._mesh.seconds("all_sum", value.type.nbytes)
        half = self._mesh.seconds("all_sum", value.type.nbytes / 2)
        return half / 2 > 2 * half - whole

    def _hidden(self) -> float:
        """Seconds of a half's sum, of the largest."""
        sums = [n.output.type.nbytes / 2 for n in self.ways if n.op == _SUM]
        return max((self._mesh.seconds("all_sum", nbytes) / 2 for nbytes in sums), default=0.0)

    def _begin(self, node: Node) -> set[Node]:
        """A sum, and what comes before it up to a product."""
        taken: dict[Node, Way] = {}
        if not all(self._before(node, node.output.ndim - 2, taken)):
            return set()
        for one, way in taken.items():
            self._take(one, way)
        return set(taken)

    def _before(self, node: Node, axis: int, taken: dict[Node, Way]) -> Iterator[bool]:
        """Can all of it go in halves?"""
        way = _along(node, node.output, axis)
        yield way is not None and len(node.outputs) == 1
        if way is None:
            return
        taken[node] = way
        if node.op in _PRODUCTS:
            return
        for value, at in zip(node.inputs, way.needs, strict=True):
            if at is not None:
                yield value.node.op not in ("input", "constant")
                yield from self._before(value.node, at, taken)

    def _go_on(self, node: Node) -> None:
        for value in node.inputs:
            axis = self._axes.get(value)
            way = None if axis is None or node.bodies else _along(node, value, axis)
            if way is None:
                continue
            needs = zip(node.inputs, way.needs, strict=True)
            if all(self._axes.get(v, at) == at for v, at in needs):
                self._take(node, way)
            return

    def _take(self, node: Node, way: Way) -> None:
        self.ways[node] = way
        self._axes.update(zip(node.outputs, way.gives, strict=True))


def _users(graph: Graph, node: Node) -> Iterator[Node]:
    for value in node.outputs:
        yield from graph.users.get(value, ())


class _Halving:
    """Makes the graph."""

    def __init__(self, graph: Graph, chosen: _Choice, mesh: Mesh) -> None:
        self._graph = graph
        self._ways = chosen.ways
        self._mesh = mesh
        self._whole: dict[Value, Value] = {v: v for v in graph.inputs}
        self._halves: dict[Value, tuple[int, list[Value]]] = {}

    def run(self) -> Graph:
        for node in self._graph.nodes:
            if node in self._ways:
                with stating(node.origin.by(_NAME)):
                    self._in_halves(node, self._ways[node])
            else:
                given = [self._get(v) for v in node.inputs]
                same = all(new is old for new, old in zip(given, node.inputs, strict=True))
                new = node if same else node.with_inputs(dict(zip(node.inputs, given, strict=True)))
                self._whole.update(zip(node.outputs, new.outputs, strict=True))
        outputs = [self._get(v) for v in self._graph.outputs]
        return self._graph.replace(nodes=in_order(outputs, self._graph.inputs), outputs=outputs)

    def _get(self, value: Value) -> Value:
        if value not in self._whole:
            axis, halves = self._halves[value]
            with stating(value.node.origin.by(_NAME)):
                joined = apply("concatenate", ([Tensor(v) for v in halves], axis))
            self._whole[value] = joined.value
        return self._whole[value]

    def _half(self, value: Value, axis: int, which: int) -> Value:
        if value in self._halves:
            return self._halves[value][1][which]
        middle = value.shape[axis] // 2
        part = slice(0, middle) if which == 0 else slice(middle, value.shape[axis])
        places = (slice(None),) * axis + (part,)
        found: Value = apply("getitem", (Tensor(self._get(value)), places)).value
        return found

    def _in_halves(self, node: Node, way: Way) -> None:
        made = [self._made(node, way, which).outputs for which in range(2)]
        for i, (value, axis) in enumerate(zip(node.outputs, way.gives, strict=True)):
            self._halves[value] = axis, [outputs[i] for outputs in made]
        if node.op == _SUM:
            why = "each is summed beside what the other, or what comes next, is computed by"
            record(Entry.of(node, _NAME, "split", why, 1))

    def _made(self, node: Node, way: Way, which: int) -> Node:
        needs = zip(node.inputs, way.needs, strict=True)
        given = [self._get(v) if at is None else self._half(v, at, which) for v, at in needs]
        if way.spec is None:
            nbytes = given[0].type.nbytes
            micros = 1e6 * self._mesh.seconds("all_sum", nbytes)
            how = f"all_sum over {self._mesh.backend}, {nbytes} bytes, {micros:.0f} µs"
            return rebuilt(node, given, {}).replace(kernel=how)
        results = [_halved(v, axis) for v, axis in zip(node.outputs, way.gives, strict=True)]
        changed = {}
        if way.spec.local_args is not None:
            changed = dict(way.spec.local_args(node, [v.type for v in given], results))
        return rebuilt(node, given, changed)


def _halved(value: Value, axis: int) -> TensorType:
    shape = list(value.shape)
    shape[axis] //= 2
    return TensorType(tuple(shape), value.dtype)
