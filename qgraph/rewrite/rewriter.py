"""Building a graph from another: unchanged nodes are kept as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from ..ir.graph import Graph, Node, Value
from ..ir.loops import CONTROL_FLOW, REGION
from ..origin import Maker, making

_replaced: ContextVar[dict[Value, Value] | None] = ContextVar("replaced", default=None)


@contextmanager
def collecting_replacements() -> Iterator[dict[Value, Value]]:
    """Collect which value took which one's place while this is open."""
    pairs: dict[Value, Value] = {}
    token = _replaced.set(pairs)
    try:
        yield pairs
    finally:
        _replaced.reset(token)


Visit = Callable[[Node, Node], Sequence[Value] | Mapping[Value, Value] | None]
"""Gets a node over the new graph's values, and the node of the old graph that it was; returns what
replaces its outputs, or None.

A mapping from values of the new graph replaces outputs of earlier nodes too, for whatever comes
after this one: what came before keeps reading them as they were.
"""


Visitor = Callable[[Graph], Visit | None]
"""Makes the `Visit` of a graph, or None where nothing in the graph itself is to be replaced."""


def rewrite(graph: Graph, visitor: Visitor, made_by: str) -> Graph:
    """Replace nodes one by one in topological order, in bodies first.

    What a region holds is settled: its back end has been asked about it, so it stays as it is.

    A visit may return values of the graph or of nodes it makes; new nodes get the origin of the
    node they stand for, marked with the pass.  A graph in which nothing is replaced is returned
    as it was.

    Args:
        visitor: called for the graph and for each body.
        made_by: name of the pass.
    """
    maker = Maker(made_by)
    token = making.set(maker)
    try:
        return _rewrite(graph, visitor, maker)
    finally:
        making.reset(token)


def _rewrite(graph: Graph, visitor: Visitor, maker: Maker) -> Graph:
    visit = visitor(graph)
    if visit is None and graph.ops.isdisjoint(CONTROL_FLOW):
        return graph
    replace: dict[Value, Value] = {}
    done: dict[Node, None] = dict.fromkeys(value.node for value in graph.inputs)
    skip = len(done)
    changed = False
    for node in graph.nodes:
        new = node.with_inputs(replace) if replace else node
        if node.bodies and node.op != REGION:
            new = with_bodies(new, lambda body: _rewrite(body, visitor, maker))
        maker.origin = node.origin
        results = None if visit is None else visit(new, node)
        maker.origin = None
        if isinstance(results, Mapping):
            replace.update({old: results[v] for old, v in replace.items() if v in results})
            replace.update(results)
            results = [results[v] for v in new.outputs]
        if results is None:
            done[new] = None
            results = new.outputs
        else:
            _emit(results, done)
        if new is not node or results is not new.outputs:
            changed = True
            replace.update(
                (old, r) for old, r in zip(node.outputs, results, strict=True) if r is not old
            )
    if not changed:
        return graph
    pairs = _replaced.get()
    if pairs is not None:
        pairs.update(replace)
    outputs = [replace.get(v, v) for v in graph.outputs]
    return graph.replace(nodes=list(done)[skip:], outputs=outputs)


def rewrite_each(
    graph: Graph,
    visit: Callable[[Node], Sequence[Value] | None],
    made_by: str,
    ops: Collection[str] | None = None,
) -> Graph:
    """`rewrite` for a visit that asks for nothing but the node, in whichever graph it stands.

    Args:
        ops: the only ones that the visit replaces; a graph that has none of them costs nothing.
    """

    def each(node: Node, _: Node) -> Sequence[Value] | None:
        return visit(node) if ops is None or node.op in ops else None

    def visitor(inner: Graph) -> Visit | None:
        return None if ops is not None and inner.ops.isdisjoint(ops) else each

    return rewrite(graph, visitor, made_by)


def with_bodies(node: Node, change: Callable[[Graph], Graph]) -> Node:
    """The node with `change` applied to its bodies; the same node if none changes."""
    if not node.bodies:
        return node
    bodies = tuple(change(body) for body in node.bodies)
    if all(new is old for new, old in zip(bodies, node.bodies, strict=True)):
        return node
    return node.replace(bodies=bodies)


def _emit(results: Iterable[Value], done: dict[Node, None]) -> None:
    """Add the nodes that `results` need to those done, each after its inputs."""
    stack = [(value.node, False) for value in results]
    while stack:
        node, ready = stack.pop()
        if node in done:
            continue
        if ready:
            done[node] = None
        else:
            stack.append((node, True))
            stack.extend((v.node, False) for v in reversed(node.inputs))
