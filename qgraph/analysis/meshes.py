"""A spread graph as one rank runs it, and as one process runs it for all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from ..errors import UnsupportedError
from ..ir.graph import (
    Graph,
    Node,
    Value,
    in_order,
    input_value,
    is_constant,
    map_values,
    reachable,
)
from ..ir.loops import CONTROL_FLOW, Body, bodies, invariant_names
from ..ir.ops import OPS
from ..kernels.collectives import part
from ..mesh import Mesh
from ..origin import stating
from ..rewrite.rewriter import rewrite_each
from ..tracing.tensor import Tensor, apply
from ..types import TensorType


def is_collective(node: Node) -> bool:
    return node.op in OPS and OPS[node.op].kind == "collective"


def is_spread(graph: Graph) -> bool:
    """Does what the graph computes depend on the rank that runs it?"""
    return any(_is_part(node) or is_collective(node) for _, node in graph.walk())


def _is_part(node: Node) -> bool:
    return node.op == "distributed.part"


def for_mesh(graph: Graph, mesh: Mesh | None) -> Graph:
    """The graph that this process runs: its rank's, or one that runs every rank in turn."""
    if mesh is None or mesh.size == 1 or not is_spread(graph):
        return graph
    return in_one_process(graph, mesh.size) if mesh.rank is None else for_rank(graph, mesh.rank)


class Part(NamedTuple):
    """What a rank holds of a value: so much of it along an axis, zeros beyond the value's end."""

    axis: int
    size: int
    whole: TensorType

    @property
    def type(self) -> TensorType:
        shape = list(self.whole.shape)
        shape[self.axis] = self.size
        return TensorType(tuple(shape), self.whole.dtype)

    def of(self, array: mx.array, mesh: Mesh) -> mx.array:
        """The part that this rank holds of a whole array; one that is a part stays."""
        if array.shape == self.type.shape:
            return array
        return part(array, self.axis, self.size, mesh.size, mesh.rank or 0)


def keeping_parts(graph: Graph, states: Sequence[tuple[int, int]]) -> tuple[Graph, dict[int, Part]]:
    """The graph that takes and gives a rank's parts of states, and which those are.

    Args:
        states: numbers of an input and the result that it is at the next call.

    Returns:
        The graph, and which part each input is that is no longer whole, by its number.
    """
    inputs, outputs = list(graph.inputs), list(graph.outputs)
    replace: dict[Value, Value] = {}
    parts = {}
    for i, j in states:
        whole, joined = graph.inputs[i], graph.outputs[j].node
        taken = graph.users.get(whole, ())
        forms = {(n.args.get("axis"), n.args.get("size")) for n in taken if _is_part(n)}
        if joined.op != "distributed.join" or whole in graph.outputs:
            continue
        axis, kept = joined.args["axis"], joined.operand("x")
        if forms != {(axis, kept.shape[axis])} or not all(map(_is_part, taken)):
            continue
        inputs[i] = input_value(kept.type, whole.node.args["name"])
        replace.update((n.output, inputs[i]) for n in taken)
        outputs[j] = kept
        parts[i] = Part(axis, kept.shape[axis], whole.type)
    gone = {value.node for value in replace}
    nodes = []
    for node in graph.nodes:
        if node not in gone:
            nodes.append(node.with_inputs(replace))
            replace.update(zip(node.outputs, nodes[-1].outputs, strict=True))
    outputs = [replace.get(v, v) for v in outputs]
    read = set(reachable(outputs, stop=inputs))
    nodes = [node for node in nodes if node in read]
    return graph.replace(inputs=inputs, nodes=nodes, outputs=outputs), parts


def note_parts(graph: Graph) -> None:
    """Let constants know which parts are taken of them, for programs to come."""
    for node in graph.nodes:
        if _is_part(node) and is_constant(whole := node.operand("x")):
            whole.node.args["data"].parts.add((node.args["axis"], node.args["size"]))


def for_rank(graph: Graph, rank: int) -> Graph:
    """The graph with the parts that `rank` holds, known by their places."""

    def visit(node: Node) -> Sequence[Value] | None:
        if node.op == "distributed.join":
            return [_join(node)]
        return [_part(node, node.operand("x"), rank)] if _is_part(node) else None

    return rewrite_each(graph, visit, "")


def _part(node: Node, whole: Value, rank: int) -> Value:
    """`kernels/collectives.part` in ops; where it is kept a copy, as a slice holds the whole."""
    axis, size = node.args["axis"], node.args["size"]
    length = whole.shape[axis]
    start, stop = min(rank * size, length), min((rank + 1) * size, length)

    def staged(op: str, x: Value, *args: object) -> Value:
        made: Value = apply(op, (Tensor(x), *args)).value.node.replace(stage=node.stage).output
        return made

    found = staged("getitem", whole, ((slice(None),) * axis + (slice(start, stop),)))
    if stop - start < size:
        widths = tuple((0, size - (stop - start) if i == axis else 0) for i in range(whole.ndim))
        return staged("pad", found, widths)
    return found if node.stage == "run" else staged("contiguous", found)


def _join(node: Node) -> Value:
    """`distributed.join` in ops."""
    axis, length, ranks = (node.args[name] for name in ("axis", "length", "ranks"))
    x = Tensor(node.operand("x"))
    joined = apply("distributed.all_gather", (apply("expand_dims", (x, 0)), ranks))
    joined = apply("moveaxis", (joined, 0, axis))
    shape = list(x.shape)
    shape[axis] *= ranks
    joined = apply("reshape", (joined, tuple(shape)))
    if shape[axis] > length:
        joined = apply("getitem", (joined, ((slice(None),) * axis + (slice(0, length),))))
    value: Value = joined.value
    return value


def in_one_process(graph: Graph, ranks: int) -> Graph:
    """A graph that carries out each node for each rank, collectives computed.

    It takes and gives what one rank does.  What is the same on all ranks is computed once.
    """
    together = _Together(ranks)
    for value in graph.inputs:
        together.values[value] = [value] * ranks
    for node in graph.nodes:
        together.add(node)
    outputs = [together.values[v][0] for v in graph.outputs]
    return graph.replace(nodes=in_order(outputs, graph.inputs), outputs=outputs)


class _Together:
    """All ranks' values of a graph or a body.

    Attributes:
        values: for each value of the graph, that of each rank; one and the same where all have it
            in common.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.values: dict[Value, list[Value]] = {}

    def add(self, node: Node) -> None:
        with stating(node.origin):
            if node.op in CONTROL_FLOW:
                results = self._loop(node)
            elif is_collective(node):
                results = [self._collective(node)]
            else:
                results = self._each(node)
        self.values.update(zip(node.outputs, results, strict=True))

    def _is_common(self, value: Value) -> bool:
        first, *rest = self.values[value]
        return all(v is first for v in rest)

    def _each(self, node: Node) -> list[list[Value]]:
        if _is_part(node):
            xs = self.values[node.operand("x")]
            return [[_part(node, x, rank) for rank, x in enumerate(xs)]]
        if all(map(self._is_common, node.inputs)):
            one = node.with_inputs({v: self.values[v][0] for v in node.inputs})
            return [[v] * self.ranks for v in one.outputs]
        copies = [node.replace(args=self._args(node, rank)).outputs for rank in range(self.ranks)]
        return [list(of_all) for of_all in zip(*copies, strict=True)]

    def _args(self, node: Node, rank: int) -> dict[str, object]:
        return {n: map_values(a, lambda v: self.values[v][rank]) for n, a in node.args.items()}

    def _collective(self, node: Node) -> list[Value]:
        name = node.op.partition(".")[2]
        if name in ("send", "recv"):
            raise UnsupportedError(
                f"qg.distributed.{name} in one process, where no rank waits for another",
                hint="launch the ranks: mlx.launch -n 2 …, and qg.Mesh.of(mx.distributed.init())",
                origin=node.origin,
            )
        xs = [Tensor(v) for v in self.values[node.operand("x")]]
        if name == "join":
            axis, length = node.args["axis"], node.args["length"]
            joined = apply("concatenate", (xs, axis))
            places = (slice(None),) * axis + (slice(0, length),)
            return [apply("getitem", (joined, places)).value] * self.ranks
        if name == "all_gather":
            joined = apply("concatenate" if xs[0].shape else "stack", (xs, 0))
            return [joined.value] * self.ranks
        word = {"all_max": "maximum", "all_min": "minimum"}.get(name, "add")
        whole = xs[0]
        for x in xs[1:]:
            whole = apply(word, (whole, x))
        if name != "sum_scatter":
            return [whole.value] * self.ranks
        return [part.value for part in apply("split", (whole, self.ranks, 0))]

    def _loop(self, node: Node) -> list[list[Value]]:
        """One loop that carries what all ranks carry, rank by rank."""
        parts, names = bodies(node), invariant_names(node)
        args = self._args(node, 0)
        args["carried"] = tuple(
            self.values[v][rank] for rank in range(self.ranks) for v in node.args["carried"]
        )
        if "xs" in node.args:
            args["xs"] = tuple(v for x in node.args["xs"] for v in self._distinct(x))
        graphs = []
        for which, (body, name) in enumerate(zip(parts, names, strict=True)):
            args[name] = tuple(v for x in node.args[name] for v in self._distinct(x))
            decides = node.op == "while_loop" and which == 0
            graphs.append(self._body(node, body, decides))
        kept = len(node.args["carried"]) if node.op != "cond" else len(node.outputs)
        types = [v.type for v in node.outputs[:kept]] * self.ranks
        types += [v.type for v in node.outputs[kept:]]
        new = node.replace(args=args, bodies=tuple(graphs), types=types)
        results = [list(new.outputs[i : self.ranks * kept : kept]) for i in range(kept)]
        return results + [[v] * self.ranks for v in new.outputs[self.ranks * kept :]]

    def _distinct(self, value: Value) -> list[Value]:
        """The ranks' values, or the one that they have in common."""
        return self.values[value][: 1 if self._is_common(value) else None]

    def _body(self, node: Node, body: Body, decides: bool) -> Graph:
        inside = _Together(self.ranks)
        inside.values.update((v, [v] * self.ranks) for v in body.counter)
        for value in body.carried:
            inside.values[value] = [_fresh(value) for _ in range(self.ranks)]
        inputs = [*body.counter]
        inputs += [inside.values[v][rank] for rank in range(self.ranks) for v in body.carried]
        outer = [*zip(body.slices, node.args.get("xs", ()), strict=True), *body.shared]
        for inner, source in outer:
            common = self._is_common(source)
            own = [inner] if common else [_fresh(inner) for _ in range(self.ranks)]
            inside.values[inner] = own * self.ranks if common else own
            inputs += own
        for each in body.graph.nodes:
            inside.add(each)
        kept = len(body.graph.outputs) if node.op == "cond" else len(body.carried)
        first, rest = body.graph.outputs[:kept], body.graph.outputs[kept:]
        outputs = [inside.values[v][rank] for rank in range(self.ranks) for v in first]
        outputs += [inside.values[v][0] for v in rest]
        if decides:
            outputs = [inside.values[body.graph.outputs[0]][0]]
        return body.graph.replace(inputs=inputs, nodes=in_order(outputs, inputs), outputs=outputs)


def _fresh(value: Value) -> Value:
    return input_value(value.type, value.node.args["name"])
