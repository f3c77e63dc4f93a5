"""Nodes that belong to experts and to the routers that choose them."""

from __future__ import annotations

import math

import numpy as np

from qgraph.ir.graph import Graph, Node, Value, is_constant
from qgraph.runtime.regions.cuda.experts import OP, check_gather
from qgraph.runtime.regions.cuda.expressions import OPERATIONS
from qgraph.runtime.regions.cuda.held import refusal
from qgraph.runtime.regions.cuda.routing import MOST, OPS
from qgraph.runtime.regions.unknown import Unknown

_ROWS = 8
_OF_PAIRS = frozenset({"split", "reshape", "sum", *OPERATIONS})


def of_experts(graph: Graph) -> frozenset[Node]:
    """Products by experts that a region on CUDA may hold, what leads to their choice, and what is
    done with their results until they are added up."""
    if OP not in graph.ops:
        return frozenset()
    found: dict[Node, None] = {}
    routed: set[Value] = set()
    gathers = [node for node in graph.nodes if node.op == OP and _is_known(node)]
    stack = [value.node for node in gathers if (value := node.value("rhs_indices")) is not None]
    while stack:  # back to the router's product
        node = stack.pop()
        if node in found or node.stage != "run":
            continue
        if node.op == "split" or _is_small(node):
            found[node] = None
            routed.update(node.inputs, filter(_is_few, node.outputs))
            stack += [value.node for value in node.inputs]
        elif node.op == "packed_matmul" and refusal(node, routing=True) is None:
            found[node] = None  # of any number of columns
    pairs: set[Value] = set()
    for node in graph.nodes:
        inputs = [v for v in node.inputs if not is_constant(v)]
        if node in gathers or (node.op == "take" and node.value("indices") in routed):
            pairs.update(node.outputs)
        elif node.op in _OF_PAIRS and any(v in pairs for v in inputs):
            if node.op != "sum":
                pairs.update(node.outputs)
        elif inputs and _is_small(node) and all(v in routed for v in inputs):
            routed.update(node.outputs)
        else:
            continue
        found[node] = None
    return frozenset(found)


def _is_small(node: Node) -> bool:
    return node.op in OPS and _is_few(node.output)


def _is_few(value: Value) -> bool:
    return value.type.size <= MOST * _ROWS


def _is_known(node: Node) -> bool:
    try:
        check_gather(node)
    except Unknown:
        return False
    return True


def in_turn(node: Node) -> Node | None:
    """The same product by experts where it takes each row of x in turn, as one without indices of
    rows does; None if it does not, or has none."""
    lhs, rhs, x = node.value("lhs_indices"), node.value("rhs_indices"), node.operand("x")
    if lhs is None or rhs is None:
        return None
    batch = x.shape[:-2]
    given = _numbers(lhs)
    if given is None or len(batch) != rhs.ndim:
        return None
    own = np.arange(math.prod(batch)).reshape(batch)
    try:
        same = np.array_equal(np.broadcast_to(given, rhs.shape), np.broadcast_to(own, rhs.shape))
    except ValueError:
        return None
    return node.replace(args={**node.args, "lhs_indices": None}) if same else None


def _numbers(value: Value) -> np.ndarray | None:
    """A constant's numbers, also where it is broadcast."""
    node = value.node
    if is_constant(value):
        return np.array(node.args["data"].array)
    if node.op in ("broadcast_to", "reshape"):
        given = _numbers(node.inputs[0])
        if given is not None:
            shape = value.shape
            return (
                np.broadcast_to(given, shape) if node.op == "broadcast_to" else given.reshape(shape)
            )
    return None
