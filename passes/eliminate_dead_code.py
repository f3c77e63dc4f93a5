"""Drop what no output needs.

Drops, in bodies too:
    1. nodes that no output needs.
    2. invariant operands and stacked inputs that a body does not read.
    3. carried values that only feed themselves, and stacked results that nobody reads.
Leaves alone:
    1. the graph's inputs: they are its signature.
    2. carried values that a condition or another carried value reads.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from qgraph.ir.graph import Graph, Node, Value, reachable
from qgraph.ir.loops import HOLDERS, LOOPS, bodies, invariant_names
from qgraph.rewrite.rewriter import Visit, rewrite


@dataclass(frozen=True)
class EliminateDeadCode:
    """See the module."""

    name: str = "eliminate-dead-code"
    contract: str = "exact"

    def __call__(self, graph: Graph) -> Graph:
        return _prune(_slim_loops(graph))


def _prune(graph: Graph) -> Graph:
    needed = set(reachable(graph.outputs, graph.inputs))
    if all(node in needed for node in graph.nodes):
        return graph
    return graph.replace(nodes=[node for node in graph.nodes if node in needed])


def _slim_loops(graph: Graph) -> Graph:
    def visitor(inner: Graph) -> Visit | None:
        if inner.ops.isdisjoint(HOLDERS):
            return None
        read = {v for node in inner.nodes for v in node.inputs} | set(inner.outputs)
        wanted = {node.serial: [v in read for v in node.outputs] for node in inner.nodes}

        def visit(node: Node, old: Node) -> Sequence[Value] | None:
            used = wanted[old.serial]
            if not node.bodies:
                return None
            slim = _slim(node, used)
            return None if slim is node else _match(node, slim, used)

        return visit

    return rewrite(graph, visitor, "")


def _match(old: Node, new: Node, used: Sequence[bool]) -> list[Value]:
    """The outputs of `new` in the places of those of `old`; a dead place gets any value."""
    if len(new.outputs) == len(old.outputs):
        return list(new.outputs)
    kept = iter(new.outputs)
    keep = _kept_outputs(old, used)
    return [next(kept) if k else new.outputs[0] for k in keep]


def _kept_outputs(node: Node, used: Sequence[bool]) -> list[bool]:
    if node.op not in LOOPS:
        return [True] * len(node.outputs)
    count = len(node.args["carried"])
    carried = live_carried(node, [i for i in range(count) if used[i]])
    keep = [i in carried for i in range(count)] + [bool(u) for u in used[count:]]
    return keep if any(keep) else [True] * len(keep)


def live_carried(node: Node, wanted: Collection[int]) -> set[int]:
    """Which carried values matter: those wanted, and those that they are computed from."""
    body = node.bodies[-1]
    count = len(node.args["carried"])
    place = {v.node: i for i, v in enumerate(bodies(node)[-1].carried)}
    live = set(wanted)
    starts = [body.outputs[i] for i in live] + list(body.outputs[count:])
    if node.op == "while_loop":
        test = bodies(node)[0]
        tested = {v.node: i for i, v in enumerate(test.carried)}
        live |= {tested[n] for n in reachable(test.graph.outputs) if n in tested}
        starts += [body.outputs[i] for i in live]
    while True:
        found = {place[n] for n in reachable(starts) if n in place} | live
        if found == live:
            return live
        live = found
        starts = [body.outputs[i] for i in live] + list(body.outputs[count:])


def _slim(node: Node, used: Sequence[bool]) -> Node:
    """`node` without the operands that its pruned bodies do not read."""
    args = dict(node.args)
    graphs = [_prune(body) for body in node.bodies]
    types = [v.type for v in node.outputs]
    keep = _kept_outputs(node, used)
    if not all(keep):
        args["carried"] = tuple(v for v, k in zip(args["carried"], keep, strict=False) if k)
        dropped = {v for b in bodies(node) for v, k in zip(b.carried, keep, strict=False) if not k}
        last = graphs[-1]
        graphs = [b.replace(inputs=[v for v in b.inputs if v not in dropped]) for b in graphs]
        graphs[-1] = _prune(
            graphs[-1].replace(outputs=[v for v, k in zip(last.outputs, keep, strict=True) if k])
        )
        types = [t for t, k in zip(types, keep, strict=True) if k]
    for i, (body, name) in enumerate(zip(graphs, invariant_names(node), strict=True)):
        graphs[i], args[name] = _drop_unread(body, args[name])
    if node.op == "scan":
        graphs[0], args["xs"] = _drop_unread_slices(graphs[0], args)
    same = all(new is old for new, old in zip(graphs, node.bodies, strict=True))
    return node if same else node.replace(args=args, bodies=tuple(graphs), types=types)


def _read(body: Graph) -> set[Value]:
    return {v for n in body.nodes for v in n.inputs} | set(body.outputs)


def _drop_unread(body: Graph, outer: tuple[Value, ...]) -> tuple[Graph, tuple[Value, ...]]:
    """Drop invariants that the body does not read, and the second of two that are one value."""
    read, own = _read(body), len(body.inputs) - len(outer)
    pairs = [(i, o) for i, o in zip(body.inputs[own:], outer, strict=True) if i in read]
    if len(pairs) == len(outer):
        return body, outer
    inputs = [*body.inputs[:own], *(inner for inner, _ in pairs)]
    return body.replace(inputs=inputs), tuple(o for _, o in pairs)


def _drop_unread_slices(
    body: Graph, args: dict[str, tuple[Value, ...]]
) -> tuple[Graph, tuple[Value, ...]]:
    start = len(args["carried"])
    xs, read = args["xs"], _read(body)
    kept = [i for i in range(len(xs)) if body.inputs[start + i] in read]
    if len(kept) == len(xs):
        return body, xs
    drop = {start + i for i in range(len(xs)) if i not in kept}
    inputs = [v for i, v in enumerate(body.inputs) if i not in drop]
    return body.replace(inputs=inputs), tuple(xs[i] for i in kept)
