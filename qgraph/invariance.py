"""Which values depend on constants and parameters alone."""

from __future__ import annotations

from .ir import Graph, Value
from .names import body_inputs
from .ops import RANDOM


def fixed_values(graph: Graph) -> set[Value]:
    """The values, in bodies too, that are the same at every call: weights and what is made of them.

    Random numbers, what `qg.keep` holds, and results of loops are computed anew each time.

    >>> import qgraph as qg
    >>> w = qg.tensor([1.0])
    >>> graph = qg.trace(lambda x: x + qg.exp(w), qg.spec((1,)))
    >>> sorted(v.node.op for v in fixed_values(graph))
    ['constant', 'exp']
    """
    return _fixed(graph, {v for v in graph.inputs if v.node.args["parameter"]})


def _fixed(graph: Graph, given: set[Value]) -> set[Value]:
    found = set(given)
    for node in graph.nodes:
        stays = node.bodies or node.op in RANDOM or node.op == "keep"
        if node.op == "constant" or (
            node.inputs and not stays and all(v in found for v in node.inputs)
        ):
            found.update(node.outputs)
        for body, (_, shared) in zip(node.bodies, body_inputs(node), strict=True):
            found |= _fixed(body, {inner for inner, outer in shared if outer in found})
    return found
