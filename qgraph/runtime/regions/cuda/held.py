"""Which nodes have a place in a region on CUDA."""

from __future__ import annotations

import math

from ....ir.graph import Node, Value, is_scalar
from ....ir.ops import setting
from ....kernels.matmul.tiled.product import Tiled
from ..unknown import Unknown
from . import attention
from .expressions import FLOATS, OPERATIONS
from .pick import check_pick, is_pick

ROWS = 8
"""Up to which the tensor cores' time is the same: 8 columns of their result are computed anyway."""

SUM = "distributed.all_sum"


def refusal(node: Node, *, routing: bool = False) -> str | None:
    """Why a node has no place in a region on CUDA; None if it may have one.

    Args:
        routing: are its results read number by number, by a router, and not by eights?

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: qg.softmax(qg.exp(x), axis=-1), qg.spec((4, 8)))
    >>> [refusal(node) for node in graph.nodes]
    [None, 'there is no phase for softmax']
    """
    try:
        check(node, routing=routing)
    except Unknown as error:
        return str(error)
    return None


def rows_of(value: Value) -> int:
    return math.prod(value.shape[:-1])


def check(node: Node, *, routing: bool = False) -> None:
    """As `refusal`, with the reason as an error."""
    if node.stream is not None:
        raise Unknown("it has a stream of its own")
    if node.op == attention.OP:
        attention.check(node)
        return
    if is_pick(node):
        check_pick(node)
        return
    if node.op == "packed_matmul":
        if node.args["kernel"] != Tiled.name:
            raise Unknown(f"its kernel is {node.args['kernel']}")
        if node.args["problem"].k % 8:
            raise Unknown("its rows are no multiples of 8")
    elif node.op == "fast.rms_norm":
        if node.value("weight") is None:
            raise Unknown("a norm without a weight")
    elif node.op == "split":
        axis = setting(node, "axis")
        if axis % node.inputs[0].ndim != node.inputs[0].ndim - 1:
            raise Unknown("a split along another axis than the last")
    elif node.op == SUM:
        if node.inputs[0].node.op != "packed_matmul":
            raise Unknown("a sum over the mesh of what no product gives")
    elif node.op not in OPERATIONS and node.op != "reshape":
        raise Unknown(f"there is no phase for {node.op}")
    for value in node.outputs:
        if value.ndim < 1 or value.dtype not in FLOATS:
            raise Unknown(f"a result of {value.type}")
        if rows_of(value) > ROWS:
            raise Unknown(f"{rows_of(value)} rows; up to {ROWS} cost the same as one")
        if value.shape[-1] % 8 and not routing:
            raise Unknown(f"{value.shape[-1]} columns, no multiple of 8")
    for value in _operands(node):
        if not is_scalar(value) and value.dtype not in FLOATS:
            raise Unknown(f"an operand of {value.type}")


def _operands(node: Node) -> list[Value]:
    return [node.operand("x")] if node.op == "packed_matmul" else list(node.inputs)
