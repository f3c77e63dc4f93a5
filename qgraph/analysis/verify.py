"""Check everything that a graph promises."""

from __future__ import annotations

from ..errors import VerifyError
from ..ir.graph import Graph, Node, Value
from ..ir.loops import CONTROL_FLOW, bodies, invariant_names
from ..ir.ops import OPS
from ..tracing.tensor import infer
from ..types import TensorType


def verify(graph: Graph, types: bool = True) -> None:
    """Raise if `graph` breaks a promise of its form.

    Checked, in bodies too: every value is an input, or made by an earlier node of the same graph;
    no node stands twice; ops exist and their outputs have the types MLX infers; packed nodes
    depend on constants alone, prepared ones on parameters and constants; loop bodies are closed,
    take what the loop gives and return what it carries.

    Args:
        types: infer types again (some microseconds a node); the rest is cheap.

    Raises:
        VerifyError: names the node, its origin and the promise.
    """
    known: dict[Value, str] = {}
    for value in graph.inputs:
        if value.node.op != "input":
            raise VerifyError(f"{graph.name}: an input is the result of {value.node.op}")
        known[value] = "prepare" if value.node.args["parameter"] else "run"
    seen: set[Node] = set()
    for node in graph.nodes:
        if node in seen:
            _fail(graph, node, "stands twice in the graph")
        seen.add(node)
        _check_node(graph, node, known, types)
        known.update((value, node.stage) for value in node.outputs)
        if node.op == "constant":
            known[node.output] = "pack"
    for value in graph.outputs:
        if value not in known:
            _fail(graph, value.node, "is an output but not in the graph")


def _fail(graph: Graph, node: Node, what: str) -> None:
    made = f" (made by {node.origin.made_by})" if node.origin.made_by else ""
    raise VerifyError(f"{graph.name}: {node.op}{made} {what}", origin=node.origin)


_ORDER = {"pack": 0, "prepare": 1, "run": 2}


def _check_node(graph: Graph, node: Node, known: dict[Value, str], types: bool) -> None:
    for value in node.inputs:
        if value not in known:
            _fail(graph, node, f"reads {value!r}, which no earlier node of this graph makes")
        if _ORDER[known[value]] > _ORDER[node.stage]:
            _fail(graph, node, f"runs in the {node.stage} step but reads a value of {known[value]}")
    if node.op == "constant":
        return
    if node.op in CONTROL_FLOW:
        _check_control_flow(graph, node)
        for body in node.bodies:
            verify(body, types)
    elif node.op not in OPS:
        _fail(graph, node, "is not an op of the table")
    elif types:
        inferred, _ = infer(OPS[node.op], node.args)
        stated = [value.type for value in node.outputs]
        if inferred != stated:
            _fail(graph, node, f"says it gives {stated}, MLX gives {inferred}")


def _types(values: tuple[Value, ...]) -> list[TensorType]:
    return [value.type for value in values]


def _check_control_flow(graph: Graph, node: Node) -> None:
    wanted = len(invariant_names(node))
    if len(node.bodies) != wanted:
        _fail(graph, node, f"has {len(node.bodies)} bodies instead of {wanted}")
    carried = _types(node.args["carried"])
    if node.op == "cond":
        results = [_types(body.outputs) for body in node.bodies]
    else:
        results = [_types(node.bodies[-1].outputs[: len(carried)])]
        if results[0] != carried:
            _fail(graph, node, f"carries {carried} but its body returns {results[0]}")
    if any(r != _types(node.outputs)[: len(r)] for r in results):
        _fail(graph, node, "gives other types than its body")
    for body in bodies(node):
        if any(inner.type != outer.type for inner, outer in body.shared):
            _fail(graph, node, f"gives {body.graph.name} invariants of other types than it takes")
        if _types(body.carried) != carried:
            _fail(graph, node, f"gives {body.graph.name} other types than it takes")
