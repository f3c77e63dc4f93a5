"""A spread graph as one process runs it for all ranks."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import UnsupportedError
from ...ir.graph import Graph, Node, Value, in_order, input_value, map_values
from ...ir.loops import CONTROL_FLOW, Body, bodies, invariant_names
from ...origin import stating
from ...tracing.tensor import Tensor, apply
from .messages import messages, zeros_like
from .ops import is_collective, is_part, part_of


def in_one_process(graph: Graph, ranks: int) -> Graph:
    """A graph that carries out each node for each rank, collectives computed.

    It takes and gives what one rank does.  What is the same on all ranks is computed once.
    """
    together = _Together(graph, ranks)
    for value in graph.inputs:
        together.values[value] = [value] * ranks
    together.run(graph.nodes)
    outputs = [together.values[v][0] for v in graph.outputs]
    return graph.replace(nodes=in_order(outputs, graph.inputs), outputs=outputs)


class _Together:
    """All ranks' values of a graph or a body.

    Attributes:
        values: for each value of the graph, that of each rank; one and the same where all have it
            in common.
    """

    def __init__(self, graph: Graph, ranks: int) -> None:
        self.ranks = ranks
        self._messages = messages(graph)
        self.values: dict[Value, list[Value]] = {}

    def run(self, nodes: Sequence[Node]) -> None:
        """Carry out nodes, each when what it takes is there: a message is sent before it comes."""
        while nodes:
            later = []
            for node in nodes:
                if self._is_ready(node):
                    self._add(node)
                else:
                    later.append(node)
            if len(later) == len(nodes):
                raise UnsupportedError(
                    "messages of which each is sent after another has come",
                    origin=later[0].origin,
                )
            nodes = later

    def _is_ready(self, node: Node) -> bool:
        if node in self._messages and self._messages[node].sent not in self.values:
            return False
        return all(value in self.values for value in node.inputs)

    def _add(self, node: Node) -> None:
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
        if is_part(node):
            xs = self.values[node.operand("x")]
            return [[part_of(node, x, rank) for rank, x in enumerate(xs)]]
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
            return self._message(node)
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

    def _message(self, node: Node) -> list[Value]:
        if node not in self._messages:
            raise UnsupportedError(
                f"qg.{node.op} in one process, without its other end",
                hint="let all ranks call both: the n-th recv takes what the n-th send gives; or "
                "launch them: mlx.launch -n 2 …, and qg.Mesh.of(mx.distributed.init())",
                origin=node.origin,
            )
        message = self._messages[node]
        if node is message.send:
            return self.values[node.operand("x")]
        found = [zeros_like(node.output)] * self.ranks
        found[message.dst] = self.values[message.sent][message.src]
        return found

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
        inside = _Together(body.graph, self.ranks)
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
        inside.run(body.graph.nodes)
        kept = len(body.graph.outputs) if node.op == "cond" else len(body.carried)
        first, rest = body.graph.outputs[:kept], body.graph.outputs[kept:]
        outputs = [inside.values[v][rank] for rank in range(self.ranks) for v in first]
        outputs += [inside.values[v][0] for v in rest]
        if decides:
            outputs = [inside.values[body.graph.outputs[0]][0]]
        return body.graph.replace(inputs=inputs, nodes=in_order(outputs, inputs), outputs=outputs)


def _fresh(value: Value) -> Value:
    return input_value(value.type, value.node.args["name"])
