"""Move quantization, and what else need not be repeated, to where it runs once.

Moves:
    1. `quantize` of what does not change in a loop, out of every loop around it, at any depth;
       also of what a loop carries and hands on as it came.
       And `quantize` of each slice of a stack of weights, as one of the stack.
    2. `quantize` of constants to the pack step, which runs once for a program.
    3. `quantize` of parameters to the prepare step, which runs once for a set of parameters.
    4. what such a `quantize` is computed from, with it.
    5. anything else that does not change, if its result is not larger than what it is computed
       from.
    6. casts of scales to the dtype that a product computes in: a small part of the weight.
    7. out of `cond` what then moves on to a step or out of a loop.
Leaves alone:
    1. a `dequantize` by itself: it would keep the dense weight alive.
    2. what would grow: a broadcast, a cast to a wider dtype.
    3. random ops, and `keep`.
    4. loops and branches themselves.
    5. in a branch, what does not move on: it would run though the branch is not taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter

from qgraph.analysis.changes import CALLS, NEVER, PARAMETERS, level_of
from qgraph.ir.graph import Graph, Node, Stage, Value, input_value, map_values
from qgraph.ir.loops import LOOPS, body_inputs, invariant_names
from qgraph.rewrite.ledger import Decision, Entry, record, weight_name

from .shared.invariants import as_invariants
from .shared.stacks import quantize_whole

_STAGES: dict[int, Stage] = {NEVER: "pack", PARAMETERS: "prepare"}


@dataclass(frozen=True)
class HoistQuantize:
    """See the module."""

    name: str = "hoist-quantize"
    contract: str = "exact"

    def __call__(self, graph: Graph) -> Graph:
        graph = as_invariants(graph, self.name)
        while True:
            levels = {v: PARAMETERS if v.node.args["parameter"] else CALLS for v in graph.inputs}
            hoisted = _hoist_from_loops(graph, levels, CALLS)
            graph = quantize_whole(hoisted, self.name)
            if graph is hoisted:
                return _stage(graph, levels)


def _hoist_from_loops(graph: Graph, levels: dict[Value, int], here: int) -> Graph:
    """Lift out of the loops in `graph` whatever may leave them; fills in `levels`.

    `here` is the level of what changes as often as the graph runs.
    """
    nodes: list[Node] = []
    replace: dict[Value, Value] = {}
    for old in graph.nodes:
        node = old.with_inputs(replace)
        if node.bodies:
            lifted, node = _hoist_from(node, levels, here)
            for new in lifted:
                levels.update(dict.fromkeys(new.outputs, level_of(new, levels, here)))
                nodes.append(new)
        if node is not old:
            replace.update(zip(old.outputs, node.outputs, strict=True))
        levels.update(dict.fromkeys(node.outputs, level_of(node, levels, here)))
        nodes.append(node)
    if not replace:
        return graph
    return graph.replace(nodes=nodes, outputs=[replace.get(v, v) for v in graph.outputs])


def _hoist_from(node: Node, levels: dict[Value, int], here: int) -> tuple[list[Node], Node]:
    """Nodes to put before a loop or branch, and it without them."""
    inside = here + (node.op in LOOPS)
    lifted: list[Node] = []
    bodies: list[Graph] = []
    args = dict(node.args)
    for body, name, (own, shared) in zip(
        node.bodies, invariant_names(node), body_inputs(node), strict=True
    ):
        inner = dict.fromkeys(own, inside) | {v: levels[source] for v, source in shared}
        # Values of the branch itself stay in it, wherever it stands.
        if node.op == "cond":
            inner |= dict.fromkeys(own, inside + 1)
        body = _hoist_from_loops(body, inner, inside)
        moved = _movable(body, inner, inside - 1)
        if moved.nodes:
            new, body, args[name] = _lift(body, moved, dict(shared), args[name], node.op)
            lifted += new
        bodies.append(body)
    if all(new is old for new, old in zip(bodies, node.bodies, strict=True)):
        return [], node
    return lifted, node.replace(args=args, bodies=tuple(bodies))


@dataclass(frozen=True)
class _Moved:
    """Nodes that leave a graph, in order; those that are read inside too stay as well."""

    nodes: tuple[Node, ...]
    stay: frozenset[Node]


def _movable(graph: Graph, levels: dict[Value, int], limit: int) -> _Moved:
    """What leaves `graph`: the nodes that are worth it, and what they are computed from."""
    free = {
        node
        for node in graph.nodes
        if node.op != "constant"
        and node.stage == "run"
        and level_of(node, levels, limit + 1) <= limit
    }
    if not free:
        return _Moved((), frozenset())
    roots = _worth_moving(graph, free)
    needed: set[Node] = set()
    read = set(graph.outputs)
    stay: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in roots or node in needed:
            needed.add(node)
            needed |= {v.node for v in node.inputs if v.node in free}
            if node not in roots and any(v in read for v in node.outputs):
                stay.add(node)
        if node not in needed or node in stay:
            read.update(node.inputs)
    return _Moved(tuple(n for n in graph.nodes if n in needed), frozenset(stay))


def _worth_moving(graph: Graph, free: set[Node]) -> set[Node]:
    """Quantizations, and what is no larger than the values from outside it is computed from."""
    sources = _Sources()
    worth = set()
    for node in graph.nodes:
        if node in free:
            size = sum(v.type.nbytes for v in node.outputs)
            small = size <= sources.follow(node)
            if (
                node.op in ("quantize", "pack_weight")
                or (node.op != "dequantize" and small)
                or (node.op in ("astype", "concatenate") and _are_scales(node.output, graph))
            ):
                worth.add(node)
    return worth


class _Sources:
    """The values from outside that each value is computed from: a bit for each, and their bytes.

    As sets they would take the square of the time where many weights are added up.
    """

    def __init__(self) -> None:
        self._known: dict[Value, tuple[int, int]] = {}
        self._nbytes: list[int] = []

    def follow(self, node: Node) -> int:
        """Bytes of all that `node` is computed from."""
        bits = nbytes = 0
        for others, size in sorted(map(self._behind, node.inputs), key=itemgetter(1), reverse=True):
            if not bits:
                bits, nbytes = others, size
                continue
            new = others & ~bits
            bits |= others
            while new:
                place = new.bit_length() - 1
                nbytes += self._nbytes[place]
                new ^= 1 << place
        self._known.update(dict.fromkeys(node.outputs, (bits, nbytes)))
        return nbytes

    def _behind(self, value: Value) -> tuple[int, int]:
        if value not in self._known:
            self._known[value] = (1 << len(self._nbytes), value.type.nbytes)
            self._nbytes.append(value.type.nbytes)
        return self._known[value]


def _are_scales(value: Value, graph: Graph) -> bool:
    """Do only quantized products read `value`, as scales or biases, here or in a loop?"""
    readers = graph.users.get(value, ())
    return (
        bool(readers)
        and value not in graph.outputs
        and all(_reads_as_scales(reader, value) for reader in readers)
    )


def _reads_as_scales(reader: Node, value: Value) -> bool:
    if reader.bodies:
        carried = [v for name in ("carried", "xs") for v in reader.args.get(name, ())]
        return value not in carried and all(
            _are_scales(inner, body)
            for body, (_, shared) in zip(reader.bodies, body_inputs(reader), strict=True)
            for inner, outer in shared
            if outer is value
        )
    if reader.op in ("packed_matmul", "packed_gather"):
        w, *scales = reader.args["packed"]
        return value in scales and value not in (w, reader.args["x"])
    product = reader.op in ("quantized_matmul", "gather_qmm")
    return product and all(reader.args.get(part) is not value for part in ("x", "w"))


def _lift(
    body: Graph,
    moved: _Moved,
    shared: dict[Value, Value],
    operands: tuple[Value, ...],
    around: str,
) -> tuple[list[Node], Graph, tuple[Value, ...]]:
    """Copies of `moved` over outer values, the body that reads their results, its operands."""
    lifted: list[Node] = []
    outside = dict(shared)
    for node in moved.nodes:
        for value in node.inputs:
            if value not in outside:  # a constant of the body
                copy = value.node.replace()
                lifted.append(copy)
                outside[value] = copy.output
        new = node.replace(
            args={k: map_values(a, outside.__getitem__) for k, a in node.args.items()}
        )
        lifted.append(new)
        outside.update(zip(node.outputs, new.outputs, strict=True))
        _report(new, "hoisted", f"out of the {around} around it")
    gone = set(moved.nodes) - moved.stay
    left = [node for node in body.nodes if node not in gone]
    read = {v for node in left for v in node.inputs} | set(body.outputs)
    replace = {
        v: input_value(v.type) for n in moved.nodes if n in gone for v in n.outputs if v in read
    }
    taken = dict(replace)
    nodes = []
    for node in left:
        new = node.with_inputs(replace)
        replace.update(zip(node.outputs, new.outputs, strict=True))
        nodes.append(new)
    graph = body.replace(
        inputs=[*body.inputs, *taken.values()],
        nodes=nodes,
        outputs=[replace.get(v, v) for v in body.outputs],
    )
    return lifted, graph, (*operands, *(outside[v] for v in taken))


def _stage(graph: Graph, levels: dict[Value, int]) -> Graph:
    """Mark what depends on constants or parameters alone with the step that computes it."""
    moved = _movable(graph, levels, PARAMETERS)
    if not moved.nodes:
        return graph
    early: dict[Value, Value] = {}
    late: dict[Value, Value] = {}
    nodes: list[Node] = []
    going = set(moved.nodes)
    for old in graph.nodes:
        if old in going:
            stage = _STAGES[level_of(old, levels, CALLS)]
            staged = old.with_inputs(early).replace(stage=stage)
            nodes.append(staged)
            early.update(zip(old.outputs, staged.outputs, strict=True))
            _report(staged, "packed" if stage == "pack" else "prepared", f"in the {stage} step")
        if old in moved.stay or old not in going:
            new = old.with_inputs(late)
            nodes.append(new)
            late.update(zip(old.outputs, new.outputs, strict=True))
        else:
            late.update((v, early[v]) for v in old.outputs)
    return graph.replace(nodes=nodes, outputs=[late.get(v, v) for v in graph.outputs])


def _report(node: Node, decision: Decision, where: str) -> None:
    if node.op in ("quantize", "dequantize"):
        name = weight_name(node.inputs[0])
        record(Entry.of(node, "hoist-quantize", decision, where, name=name))
