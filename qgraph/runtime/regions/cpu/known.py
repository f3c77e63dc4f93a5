"""What the back end for CPUs can carry out, asked of its translator."""

from __future__ import annotations

from ....ir.graph import Graph, Node, Value, input_value, is_scalar, map_values
from ....kernels.cpu.library import missing
from .refs import Unknown
from .region import translate


def why_no_engine() -> str | None:
    """Why regions cannot run on this machine, or None."""
    return missing()


def refusal(node: Node) -> str | None:
    """Why a node, or something in a body of it, has no place in a region; None if it has one.

    >>> import qgraph as qg
    >>> graph = qg.trace(lambda x: qg.linalg.inv(qg.exp(x)), qg.spec((4, 4)))
    >>> [refusal(node) for node in graph.nodes]
    [None, 'there is no kind of work for linalg.inv']
    """
    if node.stream is not None:
        return "it has a stream of its own"
    inside: dict[Value, Value] = {}
    nodes: list[Node] = []
    for value in node.inputs:
        if value in inside:
            continue
        if is_scalar(value):
            nodes.append(value.node)
            inside[value] = value
        else:
            inside[value] = input_value(value.type)
    args = {name: map_values(arg, inside.__getitem__) for name, arg in node.args.items()}
    alone = node.replace(args=args)
    inputs = [v for v in inside.values() if v.node.op == "input"]
    try:
        translate(Graph("alone", inputs, [*nodes, alone], alone.outputs), {})
    except Unknown as error:
        return str(error)
    return None
